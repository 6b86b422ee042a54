"""How many nodes a tree has at which batch size, where that is decided once, at start-up.

vLLM captures a CUDA graph per width, so the widths are few, and its scheduler looks the width up by
the number of requests. Each batch size gets the width w with the most expected tokens per time

    num_reqs * (1 + accepted(w)) / cost(num_reqs * (1 + w))

and 0 where that is not clearly more than without drafts (as core/budget.py, which decides per step
and per request where rows are free to choose; Sequoia, Chen et al. 2024, arXiv 2402.12374).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from math import inf, log

import numpy as np

from vllm_specplus.config import METHODS, SpecPlusConfig
from vllm_specplus.core.budget import MARGIN
from vllm_specplus.core.cost import CostModel
from vllm_specplus.core.growth import NUM_CHILDREN, grow

Schedule = list[tuple[int, int, int]]
"""(first batch size, last batch size, nodes), as vLLM's num_speculative_tokens_per_batch_size."""

NGRAM_RATE = 0.33
"""Fitted: of 16 nodes it expects 1.45 accepted tokens; benchmarks/results has 2.48 (greedy) and
0.40 (temperature 0.8) per round at batch size 1, with Gemma-3-270M on Spec-Bench."""
DRAFTER_RATE = 0.6
"""Assumed, neither fitted nor taken from a paper: the first draft of a trained drafter is right."""
MOST_REQS = 1024
"""Largest batch size looked at where the user sets none; vLLM's own defaults are not larger."""


def accepted(rate: float, num_nodes: int, max_depth: int) -> np.ndarray:
    """Tokens expected of the first n nodes of a best-first tree: float64 [num_nodes + 1], n from 0.

    A prior, as nothing is known at start-up: the candidate of rank r is right with probability
    rate * (1 - rate) ** r, at every node.
    """
    children = [(rank, log(rate) + rank * log(1 - rate)) for rank in range(NUM_CHILDREN)]
    probs = grow(lambda _: children, num_nodes, max_depth).probs
    return np.cumsum([0.0, *probs, *[0.0] * (num_nodes - len(probs))])


def prior_rate(methods: Iterable[str]) -> float:
    """How often the best candidate of these methods is taken to be right."""
    trained = any(name in METHODS and METHODS[name].model != "none" for name in methods)
    return DRAFTER_RATE if trained else NGRAM_RATE


def ladder(num_nodes: int, max_widths: int) -> list[int]:
    """`num_nodes`, half of it, half of that, ..., 0; the widest and 0 if there may only be few."""
    halves = [num_nodes >> i for i in range(num_nodes.bit_length())]
    return [*halves[: max(max_widths - 1, 1)], 0][:max_widths]


def every_width(num_nodes: int, max_num_reqs: int) -> Schedule:
    """A schedule with all of the ladder that fits, for graphs to be captured before costs are
    known: one batch size for each width."""
    widths = ladder(num_nodes, max_num_reqs)
    last = [*range(1, len(widths)), max_num_reqs]
    return [(i + 1, last[i], width) for i, width in enumerate(widths)]


def schedule(
    cost: CostModel,
    tokens: Sequence[float] | np.ndarray,
    widths: Sequence[int],
    max_num_reqs: int,
    max_rows: float = inf,
    margin: float = MARGIN,
) -> Schedule:
    """The best of `widths` for each batch size up to `max_num_reqs`.

    tokens: float [max(widths) + 1], what is expected of the first n nodes. max_rows: the largest
    graph; steps with drafts do not leave it. Where rows get dearer the more there are, a larger
    batch never has wider trees; what was measured is followed.
    """
    num_reqs, nodes = np.arange(1, max_num_reqs + 1)[:, None], np.array(sorted(widths))
    rows = num_reqs * (1 + nodes)
    worth = np.where(nodes > 0, (1 + np.asarray(tokens)[nodes]) * (rows <= max_rows), 1 + margin)
    best = nodes[(worth / (cost.step_ms(rows) + cost.spec_ms * (nodes > 0))).argmax(1)].tolist()
    runs = [(width, list(run)) for width, run in groupby(range(max_num_reqs), best.__getitem__)]
    return [(run[0] + 1, run[-1] + 1, width) for width, run in runs]


def plan(
    config: SpecPlusConfig,
    cost: CostModel,
    widths: Sequence[int],
    max_num_reqs: int,
    max_rows: float = inf,
) -> Schedule:
    """`schedule` with the prior for the drafters of `config`."""
    rate = prior_rate(spec.name for spec in config.methods)
    tokens = accepted(rate, config.num_nodes, config.num_speculative_tokens)
    return schedule(cost, tokens, widths, max_num_reqs, max_rows)


def describe(schedule: Schedule) -> str:
    """The line for the log: "16 nodes up to batch size 4, 8 up to 12, 0 beyond"."""
    *head, (_, _, beyond) = schedule
    parts = [f"{width} up to {last}" for _, last, width in head]
    text = ", ".join([*parts, f"{beyond} beyond" if parts else f"{beyond} nodes at every size"])
    return text.replace(" up to", " nodes up to batch size", 1)
