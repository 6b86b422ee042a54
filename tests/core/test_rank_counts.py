"""Accepted ranks: counted on hand-made trees."""

from __future__ import annotations

import pytest

from vllm_specplus.core.rank_counts import RankCounts
from vllm_specplus.core.tree import Tree


def test_ranks_are_counted_by_depth_and_rows_by_place() -> None:
    """Seen to fail with the rank among all nodes, and with rounds without a tree counted."""
    tree = Tree([5, 6, 7, 8, 9], [0, 1, 0, 1, 3])  # 5, 5-6, 7, 5-8, 7-9
    counts = RankCounts()
    for accepted in ([1, 4], [1, 2], [3], [3, 5], [1], [], []):
        counts.observe(tree, accepted)
    counts.observe(Tree(), [])
    assert counts.by_rank == [[3, 2], [2, 1]]
    assert counts.by_row == [7, 3, 1, 2, 1, 1]
    assert counts.rates(4) == [[3 / 7, 2 / 7], [2 / 5, 1 / 5]]
    assert counts.rates(1) == [[3 / 7, 2 / 7]]
    assert counts.accepted(7) == pytest.approx([n / 7 for n in (0, 3, 4, 6, 7, 8, 8, 8)])


def test_nothing_counted_is_nothing_expected() -> None:
    assert RankCounts().rates(3) == []
    assert RankCounts().accepted(2) == [0.0, 0.0, 0.0]
