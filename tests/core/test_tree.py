"""Trees of one request and of a batch: prefixes, ancestry, the flat code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.core.strategies import path_rows, trees
from vllm_specplus.core.tree import MAX_ROWS, WORD_BITS, QKind, Tree, TreeBatch
from vllm_specplus.shapes import MAX_NODES

STAR = Tree(range(63), [0] * 63)
FULL = Tree([1, 2, 1, 2, 1, 2], [0, 0, 1, 1, 2, 2])


@given(trees(), st.integers(0, 127))
def test_every_prefix_is_a_tree(tree: Tree, num_nodes: int) -> None:
    prefix = tree.prefix(num_nodes)
    prefix.validate()
    assert len(prefix) == min(num_nodes, len(tree))
    assert prefix.depths() == tree.depths()[: len(prefix) + 1]


@given(trees())
def test_ancestors_and_depths_are_those_of_a_walk_to_the_root(tree: Tree) -> None:
    paths = [path_rows(tree, row) for row in range(len(tree) + 1)]
    assert tree.depths() == [len(path) - 1 for path in paths]
    assert tree.ancestors() == [sum(1 << row for row in path) for path in paths]
    assert tree.branches == any(len(path) != row + 1 for row, path in enumerate(paths))


@given(trees(), st.integers(0, 127))
def test_code_round_trip_and_prefix(tree: Tree, num_nodes: int) -> None:
    codes = tree.encode()
    for decoded, wanted in (
        (Tree.decode(codes), tree),
        (Tree.decode(codes[:num_nodes]), tree.prefix(num_nodes)),
    ):
        assert list(decoded.tokens) == list(wanted.tokens)
        assert list(decoded.parents) == list(wanted.parents)


def test_large_tokens_and_placeholders_survive_the_code() -> None:
    tree = Tree([2**32 - 1, 262_143, 7], [0, 0, 1])
    assert list(Tree.decode(tree.encode()).tokens) == [2**32 - 1, 262_143, 7]
    chain = Tree.chain([5, 6, -1, -1])
    assert chain.encode() == [5, 6, -1, -1]
    assert list(Tree.decode([5, 6, -1, -1]).parents) == [0, 1, 2, 3]


@given(trees())
def test_as_chain_keeps_the_stem_and_the_number_of_rows(tree: Tree) -> None:
    chain = tree.as_chain()
    assert len(chain) == len(tree) and not chain.branches
    kept = [token for token in chain.tokens if token >= 0]
    assert kept == list(tree.tokens[: len(kept)])
    assert list(tree.parents[: len(kept)]) == list(range(len(kept)))
    assert len(kept) == len(tree) or tree.parents[len(kept)] != len(kept)


@given(st.lists(trees(), min_size=1, max_size=4))
def test_batch_holds_the_trees_and_empty_padding(batch: list[Tree]) -> None:
    tensors = TreeBatch.from_trees(batch)
    assert tensors.num_rows == 1 + max(map(len, batch))
    assert tensors.ancestor_mask.shape[2] == -(-tensors.num_rows // WORD_BITS)
    assert tensors.num_nodes.tolist() == [len(tree) for tree in batch]
    for r, tree in enumerate(batch):
        n, padding = len(tree) + 1, tensors.num_rows - len(tree) - 1
        assert tensors.tokens[r].tolist() == [-1, *tree.tokens, *[-1] * padding]
        assert tensors.parents[r].tolist() == [-1, *tree.parents, *[0] * padding]
        assert tensors.depths[r].tolist() == [*tree.depths(), *[0] * padding]
        assert tensors.valid()[r].tolist() == [True] * n + [False] * padding
        for row in range(tensors.num_rows):
            ancestors = path_rows(tree, row) if row < n else []
            assert _bits(tensors.ancestor_mask[r, row]) == ancestors


@pytest.mark.parametrize("num_nodes", [0, 1, 62, 63, 64, 65, 127])
def test_chains_and_stars_around_a_word(num_nodes: int) -> None:
    for tree in (Tree.chain(range(num_nodes)), Tree(range(num_nodes), [0] * num_nodes)):
        masks = TreeBatch.from_trees([tree]).ancestor_mask[0]
        assert [_bits(mask) for mask in masks] == [path_rows(tree, r) for r in range(num_nodes + 1)]


def test_the_kind_of_q_is_told_per_node() -> None:
    batch = TreeBatch.from_trees([Tree([1, 2], [0, 0], QKind.SAMPLED), Tree(), STAR])
    assert batch.is_sampled[:, :3].tolist() == [[False, True, True], [False] * 3, [False] * 3]
    assert not batch.is_sampled[:, 3:].any()


@pytest.mark.parametrize(
    ("tokens", "parents", "message"),
    [
        ([1], [1], "parent of row 1 is 1"),
        ([1, 2], [0, -1], "parent of row 2 is -1"),
        ([1, 1], [0, 0], "row 2 repeats token 1 under parent 0"),
        ([1, 2], [0], "2 tokens and 1 parents"),
        (range(MAX_ROWS), range(MAX_ROWS), f"at most {MAX_NODES}"),
    ],
)
def test_what_is_no_tree_is_refused(tokens: list[int], parents: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tree(tokens, parents).validate()


def test_placeholders_may_be_siblings() -> None:
    Tree([-1, -1], [0, 0]).validate()


def _bits(words: torch.Tensor) -> list[int]:
    return [64 * w + i for w, word in enumerate(words.tolist()) for i in range(64) if word >> i & 1]
