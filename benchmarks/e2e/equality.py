"""Are the texts those of plain decoding, and if not, was it a near-tie of the target model?

A forward pass over more rows rounds differently, so in bf16 two logits that are (nearly) equal can
swap, with speculation or without. Where a greedy text leaves plain's, plain is asked for the logits
after the common prefix: if both tokens are within `NEAR_TIE_ULPS` units in the last place of the
best logit, that was rounding; anything else is an error of the method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from benchmarks.e2e.measure import Plan, Run
from benchmarks.e2e.methods import PLAIN

NEAR_TIE_ULPS = 4
"""Stock vLLM's own n-gram drafter was seen to leave plain's text at gaps of 0 to 3."""
NUM_CANDIDATES = 8
SIGNIFICAND_BITS = {"bfloat16": 8, "float16": 11, "float32": 24}
END = -1

TopLogits = Callable[[Sequence[int], int], list[tuple[int, float]]]
"""(prompt token ids, count) -> (token id, logit) pairs, largest logit first."""
Texts = Mapping[int, tuple[int, ...]]
"""Prompt index -> generated token ids."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first token at which a text leaves plain's text (`END` where a text is over)."""

    prompt_index: int
    token_index: int
    plain_token: int
    token: int
    logit_gap: float | None = None
    """Best logit minus the lower one of both tokens; None if sampled or not a candidate."""
    gap_in_ulps: float | None = None
    """The same in units in the last place of the best logit in the model's dtype."""

    @property
    def near_tie(self) -> bool:
        """Whether rounding explains the difference."""
        return self.gap_in_ulps is not None and self.gap_in_ulps <= NEAR_TIE_ULPS


@dataclass(frozen=True, slots=True)
class Equality:
    """How many of a method's texts equal plain's; plain itself is compared across batch sizes."""

    method: str
    batch_size: int
    plain_batch_size: int
    compared: int
    divergences: tuple[Divergence, ...]
    greedy: bool
    """Sampled texts may differ: only the rule `match` keeps plain's random numbers."""

    @property
    def num_equal(self) -> int:
        """Texts that equal plain's token for token."""
        return self.compared - len(self.divergences)

    @property
    def num_unexplained(self) -> int:
        """Greedy texts that leave plain's where plain had no near-tie."""
        return self.greedy * sum(not divergence.near_tie for divergence in self.divergences)


def compare(runs: Sequence[Run], plan: Plan, dtype: str, top_logits: TopLogits) -> list[Equality]:
    """Every method and batch size against plain at that size, plain against its first size."""
    texts = _texts(runs)
    first_size = plan.batch_sizes[0]
    greedy = plan.temperature == 0
    results = []
    for (method, size), found in texts.items():
        plain_size = first_size if method == PLAIN else size
        if (method, size) == (PLAIN, plain_size):
            continue
        divergences = find_divergences(found, texts[PLAIN, plain_size])
        for number, divergence in enumerate(divergences if greedy else ()):
            index = divergence.prompt_index
            prefix = [*plan.prompt_ids[index], *found[index][: divergence.token_index]]
            logits = top_logits(prefix, NUM_CANDIDATES)
            divergences[number] = explain(divergence, logits, dtype)
        results.append(Equality(method, size, plain_size, len(found), tuple(divergences), greedy))
    return results


def find_divergences(texts: Texts, plain: Texts) -> list[Divergence]:
    """The first difference of every text that differs from plain's."""
    found = []
    for index, token_ids in texts.items():
        pairs = enumerate(zip_longest(plain[index], token_ids, fillvalue=END))
        different = ((at, left, right) for at, (left, right) in pairs if left != right)
        if (first := next(different, None)) is not None:
            found.append(Divergence(index, *first))
    return found


def explain(
    divergence: Divergence, top_logits: Sequence[tuple[int, float]], dtype: str
) -> Divergence:
    """Add the gap, from plain's largest logits after the common prefix (largest first)."""
    logits = dict(top_logits)
    best = top_logits[0][1]
    if not {divergence.plain_token, divergence.token} <= logits.keys():
        return divergence
    gap = best - min(logits[divergence.plain_token], logits[divergence.token])
    return replace(divergence, logit_gap=gap, gap_in_ulps=gap / unit_in_last_place(best, dtype))


def unit_in_last_place(value: float, dtype: str) -> float:
    """Distance of neighbouring floats of `dtype` at `value`."""
    return 2.0 ** (math.frexp(value)[1] - SIGNIFICAND_BITS[dtype])


def _texts(runs: Sequence[Run]) -> dict[tuple[str, int], dict[int, tuple[int, ...]]]:
    """By method and batch size the first text of each prompt."""
    texts: dict[tuple[str, int], dict[int, tuple[int, ...]]] = {}
    for run in runs:
        by_prompt = texts.setdefault((run.method, run.round.batch_size), {})
        for index, token_ids in zip(run.round.group, run.generated.token_ids, strict=True):
            by_prompt.setdefault(index, token_ids)
    return texts
