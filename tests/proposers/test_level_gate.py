"""Which levels are worth their time.

Sabotages that were caught: the row's cost left out, closed levels that stay closed, an outlier
that is not clipped, a share that counts what other sources knew.
"""

from __future__ import annotations

import pytest

from vllm_specplus.proposers.level_gate import LevelGate, Prospect


def prospect(known: float = 0.0, most: float = 1.0, min_prob: float = 0.1, ms: float = 10.0):
    return Prospect(known, most, min_prob, ms)


def settled(share: float, ms: float) -> LevelGate:
    """A gate that has seen levels of one request bring `share` of what they could, in `ms`."""
    gate = LevelGate(1)
    for _ in range(200):
        gate.observe(0, [prospect()], [share], ms)
    return gate


def test_a_level_opens_while_its_time_is_unknown() -> None:
    assert LevelGate(2).opens(1, [prospect()])


@pytest.mark.parametrize(
    ("share", "ms", "opens"), [(0.5, 3.9, True), (0.5, 4.1, False), (0.1, 0.5, False)]
)
def test_a_level_opens_if_its_tokens_are_worth_more_than_its_time(share, ms, opens) -> None:
    """A token is worth 10 ms, and a row takes the worth of 0.1 tokens."""
    assert settled(share, ms).opens(0, [prospect()]) is opens


def test_what_other_sources_know_is_not_worth_drafting() -> None:
    gate = settled(0.5, 2.0)
    assert gate.opens(0, [prospect(known=0.2)])
    assert not gate.opens(0, [prospect(known=0.5)])
    for _ in range(200):
        gate.observe(0, [prospect(known=0.5)], [0.5], 2.0)
    assert not gate.opens(0, [prospect()])


def test_requests_add_up() -> None:
    gate = LevelGate(1)
    for _ in range(200):
        gate.observe(0, [prospect()] * 3, [0.4] * 3, 8.0)
    assert gate.opens(0, [prospect()] * 3)
    assert not gate.opens(0, [prospect(), prospect(), prospect(most=0.2)])


def test_a_closed_level_is_tried_again_sooner_where_it_nearly_pays() -> None:
    def wait(ms: float) -> int:
        gate = settled(0.3, ms)
        return next(n for n in range(1000) if gate.opens(0, [prospect()]))

    assert 1 < wait(2.5) < wait(5.0) < 150


def test_an_outlier_does_not_close_a_level() -> None:
    gate = settled(0.5, 2.0)
    gate.observe(0, [prospect()], [0.5], 1000.0)
    assert gate.opens(0, [prospect()])


def test_an_untypical_time_is_not_learned() -> None:
    gate = settled(0.5, 2.0)
    for _ in range(200):
        gate.observe(0, [prospect()], [0.5], None)
    assert gate.opens(0, [prospect()])
