"""Engines of V2 with drafters of vLLM's, and what they are asked."""

from __future__ import annotations

import tests.engine.interpreter  # noqa: F401  (before vLLM)

# isort: split
import random
from functools import cache
from typing import Any

from vllm import LLM, SamplingParams

from tests.engine.drafters import BUILDERS, HEADS, drafter_path
from tests.engine.engines import DEFAULTS, Engine, Request
from tests.engine.heads import fitted
from tests.engine.models import TINY_VOCAB_SIZE

DEPTH, NUM_NODES = 3, 8
KNOWN = 6
"""Tokens at the start of a text that heads know by heart, which are its prompt."""
DRAFTERS = {
    "draft": ("draft", "target"),
    "eagle": ("eagle", "target"),
    "eagle3": ("eagle3", "target"),
    "mtp, 1 module": ("mtp", "glm1"),
    "mtp, 3 modules": ("mtp", "glm3"),
    "heads": ("mtp3", "llama"),
    "mtp3, 2 modules": ("mtp3", "glm2"),
    "mtp3, mimo": ("mtp3", "mimo"),
    "mtp3, mimo v2": ("mtp3", "mimo_v2"),
}
"""Name -> method and target. A drafter in a folder of its own has the name of its builder."""
_STARTED: list[Engine] = []


@cache
def engine(target: str, options: tuple[tuple[str, Any], ...] = ()) -> Engine:
    settings = DEFAULTS | dict(max_num_seqs=8, skip_tokenizer_init=True) | dict(options)
    _STARTED.append(Engine(LLM(drafter_path(target), **settings), None))
    return _STARTED[-1]


def drafting(name: str, num_nodes: int | None = None, ngram: bool = True, **options: Any) -> Engine:
    """vLLM's own chain, or trees of `num_nodes`, with n-grams or without."""
    method, target = DRAFTERS[name]
    path = drafter_path(name) if name in BUILDERS else ""
    methods = f"{method}+ngram" if num_nodes is not None and ngram else method
    tree = {} if num_nodes is None else dict(speculative_tree=f"dynamic:{num_nodes}")
    settings = dict(speculative_model=f"[{methods}]{path}", num_speculative_tokens=DEPTH)
    return engine(target, tuple((settings | tree | options).items()))


def prompts(name: str, num: int) -> list[list[int]]:
    """Random tokens; for heads, what they know the continuation of."""
    if name == "heads":
        return [text[:KNOWN] for text in fitted("llama", **HEADS)[1][:num]]
    rng = random.Random(5)
    return [[rng.randrange(TINY_VOCAB_SIZE) for _ in range(5 + 4 * i)] for i in range(num)]


def requests(name: str, num: int = 6, **options: Any) -> list[Request]:
    length = 50 if name == "heads" else 20  # longer than what is known by heart
    settings = dict(temperature=0, max_tokens=length, ignore_eos=True) | options
    return [Request(prompt, SamplingParams(**settings)) for prompt in prompts(name, num)]


def texts(run_by: Engine, wanted: list[Request]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in run_by.run(wanted)]
