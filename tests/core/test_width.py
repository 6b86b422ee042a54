"""The width by batch size: the best of the ladder, never one that is expected to lose.

Seen to fail with the margin left out, with rows counted without roots, with `spec_ms` left out or
charged to plain steps, with `max_rows` not looked at, with a ladder without 0, with siblings as
likely as the best child, with one rate for all drafters, and with the worst width.
"""

from __future__ import annotations

import itertools
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_specplus.config import SpecPlusConfig
from vllm_specplus.core.budget import MARGIN
from vllm_specplus.core.cost import CostModel
from vllm_specplus.core.width import (
    NGRAM_RATE,
    Schedule,
    accepted,
    describe,
    every_width,
    ladder,
    plan,
    schedule,
)

MAX_NUM_REQS = 12
NODES = 8
curves = st.builds(
    lambda steps: dict(zip(range(1, 200, 7), itertools.accumulate(steps, initial=5.0))),  # noqa: B905
    st.lists(st.floats(0.0, 4.0), min_size=1, max_size=28),
)
gains = st.lists(st.floats(0.0, 1.0), min_size=NODES, max_size=NODES).map(
    lambda probs: list(itertools.accumulate(sorted(probs, reverse=True), initial=0.0))
)


def width(chosen: Schedule, num_reqs: int) -> int:
    (found,) = [nodes for first, last, nodes in chosen if first <= num_reqs <= last]
    return found


def rate(cost: CostModel, tokens: list[float], num_reqs: int, nodes: int) -> float:
    """Tokens per ms, by the formula of the module."""
    ms = float(cost.step_ms(num_reqs + num_reqs * nodes)) + cost.spec_ms * bool(nodes)
    return num_reqs * (1 + tokens[nodes]) / ms


@given(curves, st.floats(0.0, 2.0), gains, st.sampled_from([inf, 20, 60]))
def test_every_batch_size_gets_the_best_width(
    curve: dict[int, float], spec_ms: float, tokens: list[float], max_rows: float
) -> None:
    cost, widths = CostModel(curve, spec_ms), ladder(NODES, MAX_NUM_REQS)
    chosen = schedule(cost, tokens, widths, MAX_NUM_REQS, max_rows)
    for num_reqs in range(1, MAX_NUM_REQS + 1):
        drafted = [w for w in widths if w and num_reqs * (1 + w) <= max_rows]
        best = max((rate(cost, tokens, num_reqs, w) for w in drafted), default=0.0)
        plain = rate(cost, tokens, num_reqs, 0)
        if nodes := width(chosen, num_reqs):
            assert nodes in drafted
            assert rate(cost, tokens, num_reqs, nodes) == pytest.approx(best)
            assert best >= (1 + MARGIN) * plain * (1 - 1e-9)
        else:
            assert best <= (1 + MARGIN) * plain * (1 + 1e-9)


@given(st.floats(1, 20), st.floats(0.001, 1.0), st.floats(0.1, 0.9))
def test_larger_batches_have_no_wider_trees(fixed_ms: float, row_ms: float, right: float) -> None:
    """Where a step costs most of a fixed part and its rows, as on GPUs: memory, then arithmetic."""
    roofline = {1: fixed_ms} | {n: max(fixed_ms, n * row_ms) for n in range(2, 200)}
    affine = {n: fixed_ms + n * row_ms for n in (1, 200)}
    tokens = accepted(right, NODES, NODES)
    for curve in (roofline, affine):
        chosen = schedule(CostModel(curve), tokens, ladder(NODES, MAX_NUM_REQS), MAX_NUM_REQS)
        widths = [nodes for _, _, nodes in chosen]
        assert widths == sorted(widths, reverse=True) and len(set(widths)) == len(widths)


@given(curves, gains)
def test_a_schedule_covers_every_batch_size_once(
    curve: dict[int, float], tokens: list[float]
) -> None:
    chosen = schedule(CostModel(curve), tokens, ladder(NODES, MAX_NUM_REQS), MAX_NUM_REQS)
    covered = [n for first, last, _ in chosen for n in range(first, last + 1)]
    assert covered == list(range(1, MAX_NUM_REQS + 1))
    assert all(a != b for (_, _, a), (_, _, b) in itertools.pairwise(chosen))


def test_nothing_is_drafted_where_rows_cost_what_they_bring() -> None:
    by_row = CostModel({1: 1.0, 64: 64.0})
    assert schedule(by_row, [0.0, 1.0], [1, 0], 64) == [(1, 64, 0)]


def test_the_margin_over_plain_decides() -> None:
    """One node brings 0.5 tokens and costs half a step more, but for a hair."""
    for ms, nodes in ((1.5 / (1 + 1.1 * MARGIN), 1), (1.5 / (1 + 0.9 * MARGIN), 0)):
        assert schedule(CostModel({1: 1.0, 2: ms}), [0.0, 0.5], [1, 0], 1) == [(1, 1, nodes)]


def test_a_drafter_must_pay_for_itself() -> None:
    flat = {1: 10.0}
    assert schedule(CostModel(flat, spec_ms=4.0), [0.0, 0.5], [1, 0], 9) == [(1, 9, 1)]
    assert schedule(CostModel(flat, spec_ms=6.0), [0.0, 0.5], [1, 0], 9) == [(1, 9, 0)]


@pytest.mark.parametrize(
    ("num_nodes", "max_widths", "widths"),
    [
        (16, 99, [16, 8, 4, 2, 1, 0]),
        (12, 5, [12, 6, 3, 1, 0]),
        (16, 3, [16, 8, 0]),
        (16, 2, [16, 0]),
        (16, 1, [16]),
        (1, 9, [1, 0]),
    ],
)
def test_ladder(num_nodes: int, max_widths: int, widths: list[int]) -> None:
    assert ladder(num_nodes, max_widths) == widths


@pytest.mark.parametrize("max_num_reqs", [1, 2, 3, 6, 200])
def test_graphs_are_captured_for_every_width_that_fits(max_num_reqs: int) -> None:
    first = every_width(16, max_num_reqs)
    assert [nodes for _, _, nodes in first] == ladder(16, max_num_reqs)
    covered = [n for start, end, _ in first for n in range(start, end + 1)]
    assert covered == list(range(1, max_num_reqs + 1))


def test_the_prior_is_that_of_a_best_first_tree() -> None:
    """Rate 0.6: the best child 0.6, its best child 0.36, the root's second child 0.24, ..."""
    steps = [0.6, 0.36, 0.24, 0.216, 0.144, 0.144]
    assert accepted(0.6, 6, 9) == pytest.approx([0.0, *itertools.accumulate(steps)])
    flat = accepted(0.6, 6, 1)  # siblings only, of which there are at most 8
    assert flat[3] == pytest.approx(0.6 + 0.24 + 0.096)
    assert len(accepted(0.6, 20, 1)) == 21 and accepted(0.6, 20, 1)[20] < 1


def test_the_rate_of_ngrams_is_the_fitted_one() -> None:
    """Between the 2.48 of greedy rounds and the 0.40 of sampled ones, in benchmarks/results."""
    assert accepted(NGRAM_RATE, 16, 16)[16] == pytest.approx((2.48 + 0.40) / 2, abs=0.02)


def test_a_trained_drafter_is_trusted_more() -> None:
    cost = CostModel({1: 5.0, 64: 5.5, 256: 20.0})

    def nodes(model: str) -> int:
        options = dict(speculative_model=model, num_speculative_tokens=5, tree="dynamic:16")
        config = SpecPlusConfig.from_options(options)
        chosen = plan(config, cost, ladder(16, 64), 64)
        return sum(width(chosen, num_reqs) for num_reqs in range(1, 65))

    assert 64 < nodes("[ngram]") < nodes("[eagle+ngram]head")


def test_the_line_for_the_log() -> None:
    first = [(1, 4, 16), (5, 12, 8), (13, 64, 0)]
    assert describe(first) == "16 nodes up to batch size 4, 8 up to 12, 0 beyond"
    assert describe([(1, 64, 0)]) == "0 nodes at every size"
