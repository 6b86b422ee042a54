"""The counters of a few rounds, counted by hand."""

from __future__ import annotations

import pytest

from vllm_specplus.core.stats import FALLBACKS, SpecStats, summary


def test_counts_of_a_few_rounds() -> None:
    stats = SpecStats(max_depth=3)
    for num_nodes, num_accepted in [(4, 2), (3, 0), (0, 0), (5, 3), (1, 1)]:
        stats.observe(num_nodes, num_accepted)
    assert (stats.num_rounds, stats.num_drafts, stats.num_draft_tokens) == (5, 4, 13)
    assert stats.num_accepted_tokens_per_pos == [3, 2, 1]
    assert stats.num_accepted_tokens == 6
    assert stats.acceptance_length == 1 + 6 / 4
    assert stats.acceptance_rates == [3 / 4, 2 / 4, 1 / 4]


def test_nothing_drafted_yet() -> None:
    stats = SpecStats(max_depth=2)
    stats.observe(0, 0)
    assert stats.acceptance_length == 1.0
    assert stats.acceptance_rates == [0.0, 0.0]


def test_a_path_deeper_than_drafted_is_counted():
    stats = SpecStats(max_depth=1)
    stats.observe(5, 3)
    stats.observe(5, 0)
    assert stats.num_accepted_tokens_per_pos == [1, 1, 1]


def test_every_counter_has_a_name_of_its_own():
    stats = SpecStats(max_depth=2)
    stats.observe(4, 2)
    stats.draft_seconds += 0.5
    stats.fallbacks["penalties"] += 3
    assert stats.counts() == {
        "num_rounds": 1,
        "num_drafts": 1,
        "num_draft_tokens": 4,
        "num_accepted_tokens": 2,
        "num_accepted_tokens_per_pos/0": 1,
        "num_accepted_tokens_per_pos/1": 1,
        "draft_seconds": 0.5,
        "verify_seconds": 0,
        **{f"fallbacks/{reason}": 3 * (reason == "penalties") for reason in FALLBACKS},
    }


@pytest.mark.parametrize(
    ("rounds", "said"),
    [
        ([], "0 rounds, 0 with drafts, acceptance length 1.00 (per depth: none), 0.00 nodes"),
        (
            [(4, 2), (4, 1), (0, 0), (2, 0)],
            "4 rounds, 3 with drafts, acceptance length 2.00 (per depth: 0.667 0.333), 2.50 nodes",
        ),
    ],
)
def test_the_line_at_the_end(rounds, said):
    stats = SpecStats(max_depth=3)
    for num_nodes, num_accepted in rounds:
        stats.observe(num_nodes, num_accepted)
    line = summary(stats.counts())
    assert said in line and line.endswith("fallbacks: none") and "\n" not in line
    stats.fallbacks["does_not_pay"] += 2
    assert summary(stats.counts()).endswith("fallbacks: does_not_pay 2")
