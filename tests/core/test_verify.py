"""Rule `match`: the accepted path, and that it leaves the target's distribution as it is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.core.strategies import VOCAB_SIZE, trees
from vllm_specplus.core.tree import QKind, Tree, TreeBatch
from vllm_specplus.core.verify import match


def walk(tree: Tree, targets: list[int]) -> list[int]:
    """The accepted rows, node by node."""
    rows = [0]
    while True:
        nodes = enumerate(zip(tree.tokens, tree.parents, strict=True), start=1)
        child = [r for r, (t, p) in nodes if p == rows[-1] and t == targets[rows[-1]]]
        if not child:
            return rows
        rows += child


@given(st.lists(trees(), min_size=1, max_size=4), st.integers(0, 10**6))
def test_match_is_the_naive_walk(batch: list[Tree], seed: int) -> None:
    tensors = TreeBatch.from_trees(batch)
    generator = torch.Generator().manual_seed(seed)
    shape = (len(batch), tensors.num_rows)
    targets = torch.randint(VOCAB_SIZE, shape, generator=generator)
    for r, tree in enumerate(batch):  # more often than by chance, the target agrees with a node
        for row, parent in enumerate(tree.parents, start=1):
            if torch.rand((), generator=generator) < 0.4:
                targets[r, parent] = tree.tokens[row - 1]
    accepted = match(tensors, targets)
    for r, tree in enumerate(batch):
        assert accepted[r].nonzero().flatten().tolist() == walk(tree, targets[r].tolist())


@pytest.mark.parametrize("num_nodes", [0, 1, 62, 63, 64, 127])
@pytest.mark.parametrize("num_right", [0, 1, 63, 127])
def test_chains_over_two_words(num_nodes: int, num_right: int) -> None:
    tokens = torch.arange(num_nodes + 1)
    targets = torch.where(tokens < num_right, tokens, -5)
    batch = TreeBatch.from_trees([Tree.chain(range(num_nodes))])
    assert match(batch, targets[None]).sum() == 1 + min(num_nodes, num_right)


def test_targets_may_be_a_strided_view() -> None:
    batch = TreeBatch.from_trees([Tree([3, 4, 5], [0, 0, 2]), Tree([3], [0])])
    targets = torch.tensor([[4, 9, 5, 9], [3, 9, 9, 9]])
    wide = torch.full((4, 8), 4)
    wide[::2, ::2] = targets
    wanted = [[True, False, True, True], [True, True, False, False]]
    assert match(batch, wide[::2, ::2]).tolist() == wanted


def test_placeholders_and_padding_match_nothing() -> None:
    """Not even a target of -1, which stands for "no token" in vLLM's buffers."""
    batch = TreeBatch.from_trees([Tree.chain([1, -1, -1]), Tree([-1, -1], [0, 0]), Tree()])
    for target in (-1, 0, 1):
        accepted = match(batch, torch.full((3, 4), target))
        assert accepted.sum(1).tolist() == [2 if target == 1 else 1, 1, 1]


def test_sampled_drafts_are_refused() -> None:
    batch = TreeBatch.from_trees([Tree([2, 3], [0, 0]), Tree([1], [0], QKind.SAMPLED)])
    with pytest.raises(ValueError, match="'match' was given sampled draft nodes"):
        match(batch, torch.zeros(2, 3, dtype=torch.int64))
