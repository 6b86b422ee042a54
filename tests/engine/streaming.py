"""Requests to vLLM's asynchronous engine, as a server makes them."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from typing import Any

from vllm import AsyncEngineArgs, RequestOutput, SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from tests.engine.engines import Request, model_path

ABORTED = 2


def assert_streamed(
    asked: Sequence[Request], plain: Sequence[RequestOutput], **options: Any
) -> None:
    """The texts, joined from pieces, are the plain ones; of the aborted request it is the start."""
    texts = asyncio.run(_stream(asked, options))
    for index, output in enumerate(plain):
        whole = output.outputs[0].text
        if index == ABORTED:
            assert texts[index] and whole.startswith(texts[index]) and texts[index] != whole
        else:
            assert texts[index] == whole


async def _stream(asked: Sequence[Request], options: dict[str, Any]) -> list[str]:
    args = AsyncEngineArgs(model=str(model_path("llama")), **options)
    engine = AsyncLLM.from_engine_args(args)

    async def stream(index: int) -> str:
        params: SamplingParams = asked[index].params.clone()
        params.output_kind = RequestOutputKind.DELTA
        text = ""
        prompt = {"prompt_token_ids": list(asked[index].prompt)}
        async for output in engine.generate(prompt, params, request_id=uuid.uuid4().hex):
            text += output.outputs[0].text
            if index == ABORTED and text:
                break
        return text

    try:
        return await asyncio.gather(*(stream(index) for index in range(len(asked))))
    finally:
        engine.shutdown()
