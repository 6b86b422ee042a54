"""The text that a target writes itself: the only file of this package that imports vLLM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

from vllm_specplus.train.text import MIX, Prompt, Sample

_WAVE = 128
"""Prompts that are given to vLLM at once; after each wave the caller keeps the samples."""
_CPU_MEMORY = 0.5


class Writer:
    """A vLLM engine that continues prompts; close it before the device is needed for training.

    engine: more arguments of `LLM`.
    """

    def __init__(
        self,
        model: str,
        prompt_tokens: int,
        new_tokens: int,
        *,
        chat: bool,
        seed: int,
        dtype: str = "auto",
        **engine: Any,
    ) -> None:
        from vllm import LLM
        from vllm.platforms import current_platform

        # On CPUs vLLM asks for a share of all memory, and by default for nearly all of it.
        memory = {"gpu_memory_utilization": _CPU_MEMORY} if current_platform.is_cpu() else {}
        self.llm = LLM(
            model=model,
            dtype=dtype,
            max_model_len=prompt_tokens + new_tokens,
            seed=seed,
            enforce_eager=True,
            **memory,
            **engine,
        )
        self.prompt_tokens, self.new_tokens, self.chat = prompt_tokens, new_tokens, chat

    def held_out(self, prompts: Sequence[Prompt], start: int) -> Iterator[list[Sample]]:
        """Greedy text after every prompt from number `start` on, in waves."""
        for first in range(start, len(prompts), _WAVE):
            wave = prompts[first : first + _WAVE]
            yield self._write(wave, [0.0] * len(wave), held_out=True)

    def training(self, prompts: Sequence[Prompt], start: int) -> Iterator[list[Sample]]:
        """Text at the temperatures of MIX from sample `start` on, in waves without an end; prompts
        come round again with other temperatures."""
        for first in count(start, _WAVE):
            places = range(first, first + _WAVE)
            wave = [prompts[place % len(prompts)] for place in places]
            mixed = [MIX[(place + place // len(prompts)) % len(MIX)] for place in places]
            yield self._write(wave, mixed, held_out=False)

    def _write(
        self, prompts: Sequence[Prompt], temperatures: Sequence[float], held_out: bool
    ) -> list[Sample]:
        from vllm import SamplingParams

        encoded: list[Any] = [{"prompt_token_ids": self._encode(prompt.text)} for prompt in prompts]
        # No seeds of their own: in vLLM 0.32 those fail on CPUs where a prompt comes in chunks.
        params = [
            SamplingParams(temperature=each, max_tokens=self.new_tokens, detokenize=False)
            for each in temperatures
        ]
        outputs = self.llm.generate(encoded, params, use_tqdm=False)
        return [
            Sample(
                token_ids=[*given["prompt_token_ids"], *output.outputs[0].token_ids],
                prompt_len=len(given["prompt_token_ids"]),
                kind=prompt.kind,
                held_out=held_out,
            )
            for given, output, prompt in zip(encoded, outputs, prompts, strict=True)
        ]

    def _encode(self, text: str) -> list[int]:
        """At most `prompt_tokens`: a chat keeps its end, where the answer begins."""
        tokenizer = self.llm.get_tokenizer()
        if self.chat:
            message = [{"role": "user", "content": text}]
            ids = tokenizer.apply_chat_template(
                message, add_generation_prompt=True, return_dict=False
            )
            return list(ids)[-self.prompt_tokens :]
        return tokenizer.encode(text)[: self.prompt_tokens]

    def close(self) -> None:
        """Gives the engine's memory back."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
