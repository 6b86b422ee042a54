"""The best static tree, against all trees."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_specplus.core.growth import Path
from vllm_specplus.core.optimal import OptimalTrees, Rates, prior_rates
from vllm_specplus.shapes import StaticTree

MAX_NODES = 6
RATES = st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=3), min_size=1, max_size=4)


def trees(num_nodes: int, rates: Rates) -> set[frozenset[Path]]:
    """Every tree of so many nodes within the depths and ranks that have rates."""
    found = {frozenset[Path]()}
    for _ in range(num_nodes):
        found = {tree | {path} for tree in found for path in _growth(tree, rates)}
    return found


def _growth(tree: frozenset[Path], rates: Rates) -> Iterator[Path]:
    for parent in ((), *tree):
        rank = sum(path[:-1] == parent for path in tree if path)
        if len(parent) < len(rates) and rank < len(rates[len(parent)]):
            yield (*parent, rank)


def value(tree: frozenset[Path] | list[Path], rates: Rates) -> float:
    return sum(prod(rates[d][rank] for d, rank in enumerate(path)) for path in tree)


@settings(deadline=None)
@given(RATES)
def test_no_tree_is_better(rates: list[list[float]]) -> None:
    """Rates in any order: a younger sibling may be the better one. Seen to fail with a younger
    sibling that does not need its elder, with the depth of the parent, and with m off by one."""
    best = OptimalTrees(rates, MAX_NODES)
    for num_nodes in range(MAX_NODES + 1):
        most = max(value(tree, rates) for n in range(num_nodes + 1) for tree in trees(n, rates))
        assert best.expected[num_nodes] == pytest.approx(most)
        paths = best.paths(num_nodes)
        assert len(paths) <= num_nodes and value(paths, rates) == pytest.approx(most)
        if paths:
            assert set(StaticTree(tuple(paths)).paths) == set(paths)


def test_certain_drafts_are_a_chain_and_uncertain_ones_branch() -> None:
    sure = OptimalTrees(prior_rates(0.99, 4, 8), 8)
    assert sorted(sure.paths(8)) == [(0,) * depth for depth in range(1, 9)]
    unsure = OptimalTrees(prior_rates(0.2, 4, 8), 8)
    assert {path for path in unsure.paths(5) if len(path) == 1} == {(0,), (1,), (2,), (3,)}


def test_the_largest_trees_use_all_their_nodes() -> None:
    best = OptimalTrees(prior_rates(0.6, 8, 16), 127)
    assert len(best.paths(127)) == 127
    assert (np.diff(best.expected) > 0).all()
