"""The row budget: the best allocation, never one that is expected to lose."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_specplus.core.budget import MARGIN, RowBudget, allocate
from vllm_specplus.core.cost import CostModel

CURVE = {1: 17.9, 4: 19.0, 8: 23.3, 16: 29.2, 32: 44.9}
FREE_TO_4 = CostModel({1: 10.0, 4: 10.0, 5: 20.0})

probs = st.lists(st.floats(0.01, 1.0), max_size=4).map(lambda p: sorted(p, reverse=True))
batches = st.lists(probs, min_size=1, max_size=3)
curves = st.builds(
    lambda steps: dict(enumerate(itertools.accumulate(steps, initial=10.0), start=1)),
    st.lists(st.floats(0.0, 8.0), min_size=1, max_size=12),
)
spec = st.floats(0.0, 2.0)
weight_lists = st.lists(st.floats(0.1, 1.0), min_size=3, max_size=3)


def rate(
    batch: Sequence[Sequence[float]],
    counts: Sequence[int],
    cost: CostModel,
    weights: Sequence[float],
    row_ms: Sequence[float],
) -> float:
    """Tokens per millisecond, by the formula of the module."""
    rows = [1 + count for count in counts]
    tokens = len(batch) + sum(
        w * sum(p[:n]) for w, p, n in zip(weights, batch, counts, strict=False)
    )
    ms = float(cost.step_ms(sum(rows))) + cost.spec_ms * any(counts)
    return tokens / (ms + sum(n * extra for n, extra in zip(rows, row_ms, strict=False)))


@given(batches, curves, spec, weight_lists)
def test_allocation_is_the_best_of_all(
    batch: list[list[float]], curve: dict[int, float], spec_ms: float, weights: list[float]
) -> None:
    cost, weights = CostModel(curve, spec_ms), weights[: len(batch)]
    free = [0.0] * len(batch)
    every = itertools.product(*(range(len(p) + 1) for p in batch))
    best = max(rate(batch, counts, cost, weights, free) for counts in every)
    none = rate(batch, [0] * len(batch), cost, weights, free)
    counts = allocate(batch, cost, weights)
    if any(counts):
        assert rate(batch, counts, cost, weights, free) == pytest.approx(best)
        assert best >= (1 + MARGIN) * none * (1 - 1e-9)
    else:
        assert best <= (1 + MARGIN) * none * (1 + 1e-9)


@given(batches, curves, spec, st.lists(st.floats(0, 3), min_size=3, max_size=3))
def test_never_expected_to_be_slower_whatever_rows_cost(
    batch: list[list[float]], curve: dict[int, float], spec_ms: float, row_ms: list[float]
) -> None:
    cost, ones = CostModel(curve, spec_ms), [1.0] * len(batch)
    counts = allocate(batch, cost, row_ms=row_ms[: len(batch)])
    assert all(0 <= n <= len(p) for n, p in zip(counts, batch, strict=True))
    none = rate(batch, [0] * len(batch), cost, ones, row_ms)
    assert rate(batch, counts, cost, ones, row_ms) >= none * (1 + MARGIN * any(counts)) * (1 - 1e-9)


@given(batches, curves)
def test_no_granted_node_is_below_min_prob(
    batch: list[list[float]], curve: dict[int, float]
) -> None:
    cost = CostModel(curve)
    counts = allocate(batch, cost)
    granted = [p for probs, n in zip(batch, counts, strict=True) for p in probs[:n]]
    least = cost.min_prob(len(batch)) * (1 - 1e-9)
    assert all(prob >= least for prob in granted)


def test_rows_that_are_free_are_used_and_a_jump_is_not() -> None:
    assert allocate([[0.1] * 6], FREE_TO_4) == [3]
    assert allocate([[0.9] * 6], CostModel({1: 10.0, 4: 10.0, 5: 80.0})) == [3]


def test_margin_and_fixed_overhead_are_asked_for() -> None:
    barely = [[0.015]]
    assert allocate(barely, FREE_TO_4) == [0]
    assert allocate(barely, FREE_TO_4, margin=0.01) == [1]
    assert allocate([[0.5]], CostModel({1: 10.0, 4: 10.0}, spec_ms=6.0)) == [0]


def test_dear_rows_and_light_tokens_get_less() -> None:
    cost, same = CostModel(CURVE), [[0.6, 0.3, 0.2, 0.1]] * 2
    even = allocate(same, cost)
    assert even[0] == even[1] > 0
    sampled = allocate(same, cost, row_ms=[0.0, 3.0])
    light = allocate(same, cost, weights=[1.0, 0.1])
    assert sampled[0] > sampled[1] and light[0] > light[1]


def test_no_requests_and_no_candidates() -> None:
    assert allocate([], CostModel(CURVE)) == []
    assert allocate([[], []], CostModel(CURVE)) == [0, 0]


def test_everything_is_granted_until_costs_are_known() -> None:
    budget = RowBudget()
    assert budget.min_probs(["a", "b"]) == [0.0, 0.0]
    assert budget.allocate([[0.1, 0.1], []]) == [2, 0]
    budget.measured(CURVE)
    assert budget.min_probs(["a", "b"])[0] > 0
    assert budget.allocate([[0.001, 0.001], []]) == [0, 0]


def serve(budget: RowBudget, refill: bool) -> list[int]:
    """Four requests, the first far ahead of the rest, after 40 others came and went."""
    names = map(str, itertools.count())
    running = ["a", "b", "c"]
    for _ in range(40):
        budget.min_probs(running)
        budget.allocate([[]] * len(running))
        running = running[1:]
        if refill or not running:
            running.append(next(names))
            if not refill:
                budget.paused()
    running = ["fast", "slow1", "slow2", "slow3"]
    for _ in range(30):
        budget.min_probs(running)
        budget.allocate([[0.99] * 4, [], [], []])
    budget.min_probs(running)
    return budget.allocate([[0.6, 0.5], [0.6, 0.5], [], []])


def test_without_a_queue_the_slow_requests_come_first() -> None:
    """What a fast request gains is lost again if nobody takes its place."""
    budgets = RowBudget(), RowBudget()
    for budget in budgets:
        budget.measured({1: 10.0, 4: 12.0, 64: 72.0})
    assert serve(budgets[0], refill=True) == [2, 2, 0, 0]
    assert serve(budgets[1], refill=False) == [0, 2, 0, 0]


def test_a_single_request_is_never_held_back() -> None:
    budget = RowBudget()
    budget.measured(CURVE)
    for _ in range(50):
        [bound] = budget.min_probs(["only"])
        assert bound == pytest.approx(CostModel(CURVE).min_prob(1))
        assert budget.allocate([[0.95] * 5]) == [5]


def test_state_of_finished_requests_goes() -> None:
    budget = RowBudget()
    budget.measured(CURVE)
    for i in range(100):
        budget.min_probs([str(i), str(i + 1)])
        budget.allocate([[0.9], [0.9]])
    assert len(budget._paces) == 2


def test_a_queue_is_known_where_all_requests_finish_at_once() -> None:
    """Batches of four that end together: the next one waited for it, or came after a pause."""
    budgets = RowBudget(), RowBudget()
    for budget, pauses in zip(budgets, (False, True), strict=True):
        budget.measured({1: 10.0, 4: 12.0, 64: 72.0})
        for batch in range(30):
            names = [f"{batch}-{i}" for i in range(4)]
            for _ in range(9):
                budget.min_probs(names)
                budget.allocate([[0.99] * 4, [], [], []])
            if pauses:
                budget.paused()
    assert [budget.allocate([[0.6, 0.5], [], [], []])[0] for budget in budgets] == [2, 0]
