"""The counters of a few rounds, counted by hand."""

from __future__ import annotations

from vllm_specplus.core.stats import SpecStats


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
