"""graft against paths: the grafted tree holds the chain's paths and the tree's, each once.

Sabotages that were caught: parents not renumbered, `shared` without the ancestors' test or with
half of it, new rows one too low.
"""

from __future__ import annotations

import doctest

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from specplus_kernels.tree_grow.rows import tree_rows

from vllm_specplus.core import graft as module
from vllm_specplus.core.graft import Trunk, graft


def paths_of(tokens: list[int], parents: list[int]) -> list[tuple[int, ...]]:
    """The path of every node, in order; row 0 is the root, -1 no node."""
    paths: list[tuple[int, ...] | None] = [()]
    for token, parent in zip(tokens[1:], parents[1:], strict=True):
        above = paths[parent] if token >= 0 else None
        assert token < 0 or above is not None, "a node hangs from no node"
        paths.append(None if above is None else (*above, token))
    return [path for path in paths if path]


@st.composite
def trees(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    """A chain, and a tree with distinct siblings of few tokens, so that they often share paths."""
    chain = draw(st.lists(st.integers(0, 2), min_size=1, max_size=5))
    tokens: list[int] = []
    parents: list[int] = []
    for _ in range(draw(st.integers(0, 9))):
        parent, token = draw(st.integers(0, len(tokens))), draw(st.integers(0, 2))
        if (parent, token) not in zip(parents, tokens, strict=True):
            tokens.append(token)
            parents.append(parent)
    return chain, tokens, parents


@example(batch=[([0] * 5, [1, 0, 0, 0, 0], [0, 1, 2, 3, 4])], num_nodes=12)
@given(st.lists(trees(), min_size=1, max_size=3), st.integers(5, 16))
def test_paths_of_both_are_there_once(
    batch: list[tuple[list[int], list[int], list[int]]], num_nodes: int
) -> None:
    depth, width = len(batch[0][0]), 9
    chains = [(chain * 5)[:depth] for chain, _, _ in batch]
    tokens = torch.tensor([t + [0] * (width - len(t)) for _, t, _ in batch])
    parents = torch.tensor([p + [0] * (width - len(p)) for _, _, p in batch])
    rows = tree_rows(tokens, parents, torch.tensor([len(t) for _, t, _ in batch]))
    got = graft(Trunk.chain(torch.tensor(chains)), rows[:2], num_nodes, max_depth=width)[:2]
    assert all(x.shape == (len(batch), num_nodes + 1) for x in got)
    for chain, (_, t, p), out_tokens, out_parents in zip(
        chains, batch, got[0].tolist(), got[1].tolist(), strict=True
    ):
        own_chain = [tuple(chain[:d]) for d in range(1, depth + 1)]
        leaving = [path for path in paths_of([-1, *t], [-1, *p]) if path not in own_chain]
        assert paths_of(out_tokens, out_parents) == (own_chain + leaving)[:num_nodes]


def test_docs() -> None:
    assert doctest.testmod(module).failed == 0
