"""Growth: best-first, bounded, along static paths; against brute force."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from math import exp, inf, log

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.strategies import path_tokens
from vllm_specplus.core.growth import Candidates, Path, chain_paths, grow, prune, rank

SIZES = st.integers(0, 30)
DEPTHS = st.integers(0, 4)


class Model:
    """A random conditional distribution per path, as a proposer would give it."""

    def __init__(self, seed: int, width: int) -> None:
        self.seed, self.width = seed, width

    def __call__(self, path: Path) -> Iterable[tuple[int, float]]:
        rng = random.Random(repr((self.seed, path)))
        weights = [rng.random() for _ in range(rng.randint(0, self.width))]
        total = sum(weights) + rng.random()
        tokens = rng.sample(range(100), len(weights))
        return [(t, log(max(w, 1e-9) / total)) for t, w in zip(tokens, weights, strict=True)]

    def nodes(self, max_depth: int) -> dict[Path, float]:
        """Every path down to a depth with its probability."""
        found: dict[Path, float] = {}
        level: list[tuple[Path, float]] = [((), 0.0)]
        for _ in range(max_depth):
            level = [((*p, t), lp + d) for p, lp in level for t, d in self(p)]
            found |= {path: exp(logprob) for path, logprob in level}
        return found


models = st.builds(Model, st.integers(0, 10**6), st.integers(1, 4))


def paths_of(candidates: Candidates) -> list[Path]:
    tree = candidates.tree(len(candidates))
    return [path_tokens(tree, row) for row in range(1, len(tree) + 1)]


def rank_paths(model: Model, path: Path) -> Path:
    """The ranks, among siblings by probability, on the way to a path."""
    ranks = []
    for depth, token in enumerate(path):
        ranked = sorted(model(path[:depth]), key=lambda child: -child[1])
        ranks.append([t for t, _ in ranked].index(token))
    return tuple(ranks)


@given(models, SIZES, DEPTHS)
def test_grows_the_most_probable_nodes(model: Model, max_nodes: int, max_depth: int) -> None:
    grown = grow(model, max_nodes, max_depth)
    nodes = model.nodes(max_depth)
    assert list(grown.probs) == pytest.approx(sorted(nodes.values(), reverse=True)[:max_nodes])
    assert [nodes[path] for path in paths_of(grown)] == pytest.approx(list(grown.probs))


@given(models, SIZES, DEPTHS, SIZES)
def test_every_prefix_of_growth_and_of_pruning_is_a_tree(
    model: Model, max_nodes: int, max_depth: int, num_nodes: int
) -> None:
    grown = grow(model, max_nodes, max_depth)
    shapes = [chain_paths(3), [(0,), (1,), (0, 0), (0, 1), (1, 0)]]
    for candidates in (grown, *(prune(grown, shape) for shape in shapes)):
        candidates.tree(num_nodes).validate()
        assert list(candidates.probs) == sorted(candidates.probs, reverse=True)


@given(models, SIZES, DEPTHS, st.randoms())
def test_ranking_nodes_is_growing_them(
    model: Model, max_nodes: int, max_depth: int, rng: random.Random
) -> None:
    """From any order in which parents come first."""
    nodes = list(model.nodes(max_depth).items())
    rng.shuffle(nodes)
    ranked = rank(dict(sorted(nodes, key=lambda node: len(node[0]))), max_nodes)
    assert list(ranked.probs) == pytest.approx(list(grow(model, max_nodes, max_depth).probs))
    assert dict(zip(ranked.paths(), ranked.probs, strict=True)).items() <= dict(nodes).items()
    ranked.tree(len(ranked)).validate()


@given(models, DEPTHS, st.floats(0, 0.5))
def test_min_prob_leaves_out_the_rest(model: Model, max_depth: int, min_prob: float) -> None:
    wanted = [prob for prob in model.nodes(max_depth).values() if prob >= min_prob]
    grown = grow(model, 10**6, max_depth, min_prob)
    assert list(grown.probs) == pytest.approx(sorted(wanted, reverse=True))


@given(models, DEPTHS)
def test_static_and_dynamic_agree_on_full_trees(model: Model, max_depth: int) -> None:
    ranks = itertools.chain(*(itertools.product(range(4), repeat=d) for d in range(1, 5)))
    everything = frozenset(ranks)
    dynamic = grow(model, 10**6, max_depth)
    assert prune(dynamic, everything) == dynamic
    assert grow(model, 10**6, max_depth, paths=everything) == dynamic


@settings(deadline=None)
@given(models, st.sets(st.sampled_from([(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 1, 0)])))
def test_growing_on_static_paths_is_pruning_what_grew_freely(model: Model, some: set[Path]) -> None:
    shape = {path for path in some if all(path[:d] in some for d in range(1, len(path)))}
    pruned = prune(grow(model, 10**6, 3), shape)
    assert grow(model, 10**6, 3, paths=shape) == pruned
    wanted = {path for path in model.nodes(3) if rank_paths(model, path) in shape}
    assert set(paths_of(pruned)) == wanted


def test_chain_is_the_best_child_of_the_best_child() -> None:
    model = {(): [(7, log(0.4)), (8, log(0.5))], (8,): [(1, -inf), (2, log(0.9))], (8, 2): []}
    grown = grow(lambda path: model[path], 9, 5, paths=chain_paths(5))
    assert (list(grown.tokens), list(grown.parents)) == ([8, 2], [0, 1])
    assert chain_paths(3) == [(0,), (0, 0), (0, 0, 0)]


def test_nothing_is_expanded_that_cannot_be_used() -> None:
    calls: list[Path] = []

    def expand(path: Path) -> list[tuple[int, float]]:
        calls.append(path)
        return [(1, log(0.9)), (2, log(0.1))]

    assert len(grow(expand, 0, 5)) == len(grow(expand, 5, 0)) == 0
    assert calls == []
    grow(expand, 3, 5)
    assert calls == [(), (1,), (1, 1)]
