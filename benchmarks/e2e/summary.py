"""From runs to one row per method and batch size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from benchmarks.e2e.engine import Counters
from benchmarks.e2e.measure import Round, Run
from benchmarks.e2e.methods import PLAIN


@dataclass(frozen=True, slots=True)
class Spread:
    """Percentiles over the rounds of a row."""

    p20: float
    p50: float
    p80: float


@dataclass(frozen=True, slots=True)
class Row:
    """What a method did at a batch size; counts are totals over the rounds."""

    method: str
    batch_size: int
    num_rounds: int
    tokens_per_second: Spread
    """Of the whole batch, prefill included."""
    speedup: Spread
    """Tokens/s over those of plain in the same round."""
    total_speedup: float
    """All tokens over all seconds, over the same of plain."""
    step_ms: float
    """Wall time over engine steps, prefill included."""
    acceptance_length: float
    """Tokens per decoding step and request, steps without a draft included; plain has 1."""
    acceptance_per_depth: tuple[float, ...]
    """How many of the drafts had a token accepted at depth 1, 2, ..."""
    drafts: int
    drafted: int
    accepted: int
    nodes: float
    """Draft tokens verified per decoding step and request."""
    draft_ms: float | None
    """Of a step, in which drafts were made; None where nobody times it."""
    num_tokens: int
    seconds: float


def spread(values: Iterable[float]) -> Spread:
    """The 20th, 50th and 80th percentile."""
    return Spread(*(float(p) for p in np.percentile(list(values), (20, 50, 80))))


def summarize(runs: Sequence[Run]) -> list[Row]:
    """Rows by batch size, then in the methods' order of first appearance."""
    plain = {run.round: run for run in runs if run.method == PLAIN}
    methods = list(dict.fromkeys((PLAIN, *(run.method for run in runs))))
    batch_sizes = dict.fromkeys(run.round.batch_size for run in runs)
    return [
        _make_row([r for r in runs if (r.method, r.round.batch_size) == (method, size)], plain)
        for size in batch_sizes
        for method in methods
    ]


def _make_row(runs: Sequence[Run], plain: dict[Round, Run]) -> Row:
    counters = [run.generated.counters for run in runs]
    num_tokens = sum(run.num_tokens for run in runs)
    num_first_tokens = sum(len(run.round.group) for run in runs)
    seconds = sum(run.generated.seconds for run in runs)
    drafts = sum(c.drafts for c in counters)
    decode_steps = sum(c.decode_steps for c in counters)
    return Row(
        method=runs[0].method,
        batch_size=runs[0].round.batch_size,
        num_rounds=len(runs),
        tokens_per_second=spread(run.tokens_per_second for run in runs),
        speedup=spread(run.tokens_per_second / plain[run.round].tokens_per_second for run in runs),
        total_speedup=_total_rate(runs) / _total_rate([plain[run.round] for run in runs]),
        step_ms=1000 * seconds / sum(c.steps for c in counters),
        acceptance_length=(num_tokens - num_first_tokens) / decode_steps if decode_steps else 1.0,
        acceptance_per_depth=_per_depth([c.accepted_per_depth for c in counters], drafts),
        drafts=drafts,
        drafted=sum(c.drafted for c in counters),
        accepted=sum(c.accepted for c in counters),
        nodes=sum(c.drafted for c in counters) / decode_steps if decode_steps else 0.0,
        draft_ms=_draft_ms(counters),
        num_tokens=num_tokens,
        seconds=seconds,
    )


def _draft_ms(counters: Sequence[Counters]) -> float | None:
    seconds = [c.draft_seconds for c in counters if c.draft_seconds is not None]
    return 1000 * sum(seconds) / sum(c.steps for c in counters) if seconds else None


def _total_rate(runs: Sequence[Run]) -> float:
    return sum(run.num_tokens for run in runs) / sum(run.generated.seconds for run in runs)


def _per_depth(counts: Sequence[tuple[int, ...]], drafts: int) -> tuple[float, ...]:
    """Totals over drafts; vLLM counts as many depths as there are nodes, so drop trailing zeros."""
    totals = [sum(column) for column in zip_longest(*counts, fillvalue=0)]
    while totals and not totals[-1]:
        totals.pop()
    return tuple(total / drafts for total in totals)
