"""Estimates: sensible before anything was seen, right after much was."""

from __future__ import annotations

import random

import pytest

from vllm_specplus.proposers.calibration import Calibration, Cell, Expectations
from vllm_specplus.proposers.ngram_index import LONGEST_MATCH


def test_longer_matches_and_larger_shares_promise_more() -> None:
    calibration = Calibration()
    for share in (0.05, 0.3, 0.5, 0.9):
        probs = [calibration.estimate(n, share)[0] for n in range(1, LONGEST_MATCH + 1)]
        assert probs == sorted(probs) and 0 < probs[0] < probs[-1] < 1
    for length in (1, 4, 32):
        probs = [calibration.estimate(length, share)[0] for share in (0.01, 0.3, 0.5, 0.94)]
        assert probs == sorted(set(probs))


@pytest.mark.parametrize("real", [0.05, 0.3, 0.6, 0.95])
def test_estimates_follow_what_is_observed(real: float) -> None:
    rng = random.Random(0)
    calibration = Calibration()
    for _ in range(1500):
        _, cell, prior = calibration.estimate(3, 0.5)
        cell.observe(prior, rng.random() < real)
    assert calibration.estimate(3, 0.5)[0] == pytest.approx(real, abs=0.1)
    assert calibration.estimate(2, 0.5)[0] == pytest.approx(real, abs=0.25)  # the same cell


def test_other_kinds_of_votes_are_not_touched() -> None:
    calibration = Calibration()
    before = [calibration.estimate(n, s)[0] for n in (1, 8, 32) for s in (0.1, 0.5)]
    for _ in range(100):
        _, cell, prior = calibration.estimate(3, 0.5)
        cell.observe(prior, False)
    assert [calibration.estimate(n, s)[0] for n in (1, 8, 32) for s in (0.1, 0.5)] == before


def test_expectations_are_settled_along_the_path_that_came() -> None:
    expectations, cells = Expectations(), {}
    for path in [(), (1,), (2,), (1, 3)]:
        for token in (1, 2, 3):
            cells[path, token] = cell = Cell()
            expectations.at(path)[token] = cell, 0.5
    expectations.settle([1, 3, 9, 9])
    hits = {key for key, cell in cells.items() if cell.hits > Cell.START}
    asked = {path for (path, _), cell in cells.items() if cell.expected > Cell.START}
    assert hits == {((), 1), ((1,), 3)}
    assert asked == {(), (1,), (1, 3)}
    expectations.settle([1])
    assert cells[(), 1].hits == Cell.START + 1
