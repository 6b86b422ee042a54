"""Prompts and the table of request features that must survive speculation."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from vllm import RequestOutput, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.engine.engines import Request
from tests.engine.models import FIRST_WORD, VOCAB_SIZE

MAX_TOKENS = 40
LOGPROB_TOLERANCE = 1e-4
"""fp32 logits of the same row in matrices of different heights differ by about 1e-6."""
SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer"}, "city": {"enum": ["red", "green"]}},
    "required": ["age", "city"],
    "additionalProperties": False,
}
SAMPLED = dict(temperature=1.0)
FEATURES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seed": SAMPLED,
    "temperature": dict(temperature=0.6),
    "top_k": dict(temperature=1.5, top_k=10),
    "top_p": dict(temperature=0.8, top_p=0.7),
    "min_p": dict(temperature=1.2, min_p=0.1),
    "all_filters": dict(temperature=1.2, top_k=40, top_p=0.9, min_p=0.02),
    "repetition_penalty": dict(repetition_penalty=1.5),
    "presence_penalty": dict(presence_penalty=1.5),
    "frequency_penalty": dict(frequency_penalty=0.7),
    "penalties_seed": dict(repetition_penalty=1.3, frequency_penalty=0.5, **SAMPLED),
    "bad_words": dict(bad_words=["ut", "indind", "ot abou", "hh", "as"]),
    "bad_words_seed": dict(bad_words=["ut", "all", "ok", "ot", "me", "le"], temperature=0.5),
    "logit_bias": dict(logit_bias=dict.fromkeys(range(200, VOCAB_SIZE, 3), 1.0)),
    "logit_bias_seed": dict(logit_bias={300: 4.0, 301: -9.0}, **SAMPLED),
    "allowed_token_ids": dict(allowed_token_ids=list(range(290, 340))),
    "min_tokens": dict(min_tokens=12, stop_token_ids=list(range(250, VOCAB_SIZE))),
    "min_tokens_seed": dict(min_tokens=9, stop_token_ids=list(range(3, 150)), **SAMPLED),
    "stop_token_ids": dict(stop_token_ids=list(range(300, 320))),
    "stop_string": dict(stop=["e w", "ut", "ha"]),
    "stop_string_kept": dict(stop=["ou"], include_stop_str_in_output=True),
    "n": dict(n=3, **SAMPLED),
    "regex": dict(structured_outputs=StructuredOutputsParams(regex=r"(name|age): [a-z]{3,9}\.")),
    "choice": dict(
        structured_outputs=StructuredOutputsParams(choice=["the water", "the way", "people"])
    ),
    "json": dict(structured_outputs=StructuredOutputsParams(json=SCHEMA)),
    "json_seed": dict(structured_outputs=StructuredOutputsParams(json=SCHEMA), **SAMPLED),
    "logprobs": dict(logprobs=3),
    "logprobs_seed": dict(logprobs=0, **SAMPLED),
    "logprobs_penalty": dict(logprobs=2, repetition_penalty=1.4),
    "logprob_token_ids": dict(logprobs=3, logprob_token_ids=[299, 7, 340]),
    "prompt_logprobs": dict(prompt_logprobs=2, logprobs=1),
    "one_token": dict(max_tokens=1),
}
MIXABLE = [name for name in FEATURES if name not in ("greedy", "logprob_token_ids")]
"""In the batch of a request with logprob_token_ids vLLM's V1 sampler gives others no top ones."""


def prompts(num: int, longest: int = 100, seed: int = 0) -> list[list[int]]:
    """Token prompts of 1 to `longest` tokens; every second one repeats itself."""
    rng = random.Random(seed)
    result = []
    for index in range(num):
        length = 1 if index == 5 else rng.randint(3, longest)
        period = rng.randint(2, 9) if index % 2 else length
        pattern = [rng.randrange(FIRST_WORD, VOCAB_SIZE) for _ in range(period)]
        result.append((pattern * length)[:length])
    return result


def params(feature: str, index: int = 0, **options: Any) -> SamplingParams:
    """Sampling parameters of request `index`; sampled requests have a seed each."""
    values = {"temperature": 0.0, "max_tokens": MAX_TOKENS, **FEATURES[feature], **options}
    if values["temperature"] > 0:
        values.setdefault("seed", 100 + index)
    return SamplingParams(**values)


def requests(feature: str, num: int, **options: Any) -> list[Request]:
    return [Request(p, params(feature, i, **options)) for i, p in enumerate(prompts(num))]


def mixed(seed: int = 1, arrivals: Callable[[int], int] = lambda _: 0) -> list[Request]:
    """One request of every feature, in one batch."""
    return [
        Request(prompt, params(feature, index), arrivals(index))
        for index, (feature, prompt) in enumerate(
            zip(MIXABLE, prompts(len(MIXABLE), seed=seed), strict=True)
        )
    ]


def logprob_rows(output: RequestOutput) -> list[list[tuple[int, int, float]]]:
    """(token, rank, log-probability) per position: prompt first, then every sequence."""
    positions = [p for p in output.prompt_logprobs or () if p]
    for sequence in sorted(output.outputs, key=lambda o: o.index):
        positions += sequence.logprobs or ()
    return [[(token, lp.rank, lp.logprob) for token, lp in p.items()] for p in positions]


def facts(output: RequestOutput) -> list[tuple]:
    """What must be equal with and without speculation, per sequence."""
    return [
        (list(o.token_ids), o.text, o.finish_reason, o.stop_reason)
        for o in sorted(output.outputs, key=lambda o: o.index)
    ]


def assert_equal(ours: Sequence[RequestOutput], plain: Sequence[RequestOutput]) -> None:
    """Text, tokens, reasons and logprobs of every sequence are those of plain decoding."""
    for index, (a, b) in enumerate(zip(ours, plain, strict=True)):
        assert facts(a) == facts(b), f"request {index} differs from plain decoding"
        rows_a, rows_b = logprob_rows(a), logprob_rows(b)
        assert len(rows_a) == len(rows_b)
        for row_a, row_b in zip(rows_a, rows_b, strict=True):
            assert [r[:2] for r in row_a] == [r[:2] for r in row_b]
            assert all(
                abs(x[2] - y[2]) < LOGPROB_TOLERANCE for x, y in zip(row_a, row_b, strict=True)
            )


def differ(a: Sequence[RequestOutput], b: Sequence[RequestOutput]) -> bool:
    return any(facts(x) != facts(y) for x, y in zip(a, b, strict=True))
