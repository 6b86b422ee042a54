"""Which levels are worth their time.

Sabotages that were caught: the row's cost left out, closed levels that stay closed, trials that
count no missed rows, missed rows that are not written off, or that pile up, times of prompts that
are learned, one share for all sizes of batch, a trial of one level taken for one of another.
"""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest

from vllm_specplus.core.cost import CostModel
from vllm_specplus.proposers.level_gate import MAX_MISSED_ROWS, LevelGate, Prospect

ONE = Prospect(known=0.0, most=1.0, min_prob=0.1, token_ms=10.0, num_known=1, num_nodes=0)
"""A token is worth 10 ms, and a row of the target takes the worth of 0.1 tokens."""


def priced(ms: float, row_ms: float = 0.0) -> LevelGate:
    """A gate of a level that takes `ms`, and `row_ms` for each row beyond the first."""
    gate = LevelGate(2)
    gate.cost = CostModel({1: ms, 101: ms + 100 * row_ms})
    return gate


def settled(share: float, ms: float, row_ms: float = 0.0, num_reqs: int = 1) -> LevelGate:
    """One that has seen levels of so many requests bring `share` of what they could."""
    gate = priced(ms, row_ms)
    for _ in range(200):
        gate.observe(0, [ONE] * num_reqs, [share] * num_reqs, ms)
    return gate


def wait(gate: LevelGate, prospect: Prospect = ONE) -> int:
    """Steps until a level opens."""
    return next(n for n in range(5000) if gate.opens(0, [prospect]))


def test_a_level_opens_while_its_time_is_unknown() -> None:
    assert LevelGate(2).opens(1, [ONE])


@pytest.mark.parametrize(
    ("share", "ms", "opens"), [(0.5, 2.6, True), (0.5, 2.7, False), (0.1, 0.5, False)]
)
def test_a_level_opens_if_its_tokens_are_clearly_worth_more_than_its_time(share, ms, opens) -> None:
    """Half again as much."""
    assert settled(share, ms).opens(0, [ONE]) is opens


def test_tokens_of_any_worth_open_every_level() -> None:
    """Of a level that brought nothing, too, and step after step."""
    gate, any_worth = settled(0.0, ms=1e9), replace(ONE, min_prob=0.0, token_ms=inf)
    assert all(gate.opens(0, [any_worth]) for _ in range(10))


def test_what_other_sources_know_is_not_worth_drafting() -> None:
    gate = settled(0.5, 2.0)
    assert gate.opens(0, [replace(ONE, known=0.2)])
    assert not gate.opens(0, [replace(ONE, known=0.5)])
    for _ in range(200):
        gate.observe(0, [replace(ONE, known=0.5)], [0.0], 2.0)
    assert not gate.opens(0, [ONE])


def test_requests_add_up() -> None:
    gate = settled(0.4, 5.5, num_reqs=3)
    assert gate.opens(0, [ONE] * 3)
    assert not gate.opens(0, [ONE, ONE, replace(ONE, most=0.2)])


def test_a_closed_level_is_tried_again_for_a_hundredth_of_the_time() -> None:
    """A step of one request takes as long as its token is worth, 10 ms."""
    assert wait(settled(0.1, 5.0)) == pytest.approx(50, abs=2)
    assert wait(settled(0.1, 10.0)) == pytest.approx(100, abs=2)


def test_a_trial_pays_for_all_rows_that_were_missed() -> None:
    late = replace(ONE, num_known=101)
    assert wait(settled(0.1, 5.0, row_ms=0.1), late) == pytest.approx(150, abs=2)


def test_missed_rows_are_written_off_over_many_steps() -> None:
    """320 rows beyond the first take 6.4 ms, which is 0.2 ms for each of 32 steps."""
    late = replace(ONE, num_known=321)
    assert settled(0.5, 2.4, row_ms=0.02).opens(0, [late])
    assert not settled(0.5, 2.6, row_ms=0.02).opens(0, [late])


def test_a_closed_level_is_run_before_it_has_missed_too_many_rows() -> None:
    """Rows may cost more than trials ever save."""
    gate, step = settled(0.1, 50.0, row_ms=1.0), replace(ONE, token_ms=1.0)
    missed = (replace(step, num_known=rows) for rows in range(1, 2 * MAX_MISSED_ROWS))
    assert next(p.num_known for p in missed if gate.opens(0, [step, p])) == 1 + MAX_MISSED_ROWS


def test_a_level_that_pays_again_stays_open_after_few_trials() -> None:
    gate = settled(0.1, 3.5)
    for _ in range(4):
        wait(gate)
        gate.observe(0, [ONE], [0.9], 3.5)
    assert all(gate.opens(0, [ONE]) for _ in range(3))


def test_an_outlier_does_not_close_a_level() -> None:
    gate = settled(0.5, 2.0)
    gate.observe(0, [ONE], [0.5], 1000.0)
    assert gate.opens(0, [ONE])


def test_the_time_of_a_prompt_is_not_learned() -> None:
    gate = settled(0.5, 2.3, row_ms=0.01)
    for _ in range(50):
        gate.observe(0, [replace(ONE, num_known=300)], [0.5], 100.0)
    assert gate.opens(0, [ONE])


def test_what_a_level_brings_depends_on_the_size_of_the_batch() -> None:
    """Its nodes got rows while the request was alone, and none in a batch of 8."""
    gate = settled(0.5, 2.0)
    for _ in range(100):
        gate.observe(0, [ONE] * 8, [0.0] * 8, 2.0)
    assert not gate.opens(0, [ONE] * 8)
    assert gate.opens(0, [ONE])


def test_a_trial_is_known_until_its_level_is_learned() -> None:
    """What it brought is heard of after the levels below have been looked at."""
    gate = settled(0.1, 3.5)
    for _ in range(4):
        wait(gate)
        gate.opens(1, [ONE])
        gate.observe(0, [ONE], [0.9], 3.5)
    assert gate.opens(0, [ONE])
