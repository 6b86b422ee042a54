"""tree_stage against a walk from every row to its root.

Seen to fail: one squaring too few, the parent one row off, rows counted from the request's first
row instead of its tree's, the second word left out, the shift of a placeholder.
"""

from __future__ import annotations

import pytest
import torch
from specplus_kernels.tree_stage import tree_stage

from tests.kernels.attention_case import chain, full, random_tree, star

TREES = {"chain": chain, "star": star, "full": full, "random": random_tree}


def check(trees: list[list[int]], prompts: list[int], max_nodes: int, words: int) -> None:
    """`prompts`: rows of each request before its tree."""
    num_reqs = len(trees)
    codes = torch.full((num_reqs, max_nodes), (1 << 40) - 1)  # beyond the tree: anything
    for req, tree in enumerate(trees):
        for row, parent in enumerate(tree[1:]):
            codes[req, row] = int(torch.randint(1 << 31, ())) | (row - parent) << 32
    lens = torch.tensor([len(t) + p for t, p in zip(trees, prompts, strict=True)])
    start = torch.nn.functional.pad(lens.cumsum(0), (1, 0)).int()
    cu_rows = torch.nn.functional.pad(torch.tensor([len(t) for t in trees]).cumsum(0), (1, 0)).int()
    contexts = torch.randint(0, 1 << 20, (num_reqs,))
    positions = torch.cat(
        [c + torch.arange(int(n)) for c, n in zip(contexts, lens, strict=True)]
    ).long()
    sequential = positions.clone()
    mask = torch.full((len(positions), words), 77)
    tree_stage(codes, start, cu_rows, positions, mask)
    for req, tree in enumerate(trees):
        first = int(start[req])
        before = slice(first, first + prompts[req])
        assert positions[before].equal(sequential[before]) and (mask[before] == 77).all()
        first += prompts[req]
        for row in range(len(tree)):
            path, up = [], row
            while up >= 0:
                path.append(up)
                up = tree[up]
            words_of = [sum(1 << r % 64 for r in path if r // 64 == w) for w in range(words)]
            found = [int(word) % (1 << 64) for word in mask[first + row]]
            assert found == words_of
            assert int(positions[first + row]) == int(sequential[first]) + len(path) - 1


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("num_rows", [1, 2, 17, 63, 64, 65, 128])
def test_one_tree(gpu_provider: str, tree: str, num_rows: int) -> None:
    check([TREES[tree](num_rows)], [0], max(1, num_rows - 1), 2 if num_rows > 63 else 1)


def test_ragged_batch_with_prompts(gpu_provider: str) -> None:
    trees = [random_tree(5), chain(1), [], full(9), star(12), random_tree(12), chain(1)]
    check(trees, [0, 7, 0, 3, 0, 0, 64], max_nodes=11, words=1)


def test_deepest_chain_of_every_size(gpu_provider: str) -> None:
    for nodes in range(1, 34):
        check([chain(nodes + 1)], [0], nodes, 1)


def test_placeholders_form_a_chain(gpu_provider: str) -> None:
    codes = torch.tensor([[5, -1, -1], [-1, -2, 7]])
    start = torch.tensor([0, 4, 8], dtype=torch.int32)
    positions = torch.tensor([10, 11, 12, 13, 20, 21, 22, 23])
    mask = torch.zeros(8, 1, dtype=torch.int64)
    tree_stage(codes, start, start, positions, mask)
    assert positions.tolist() == [10, 11, 12, 13, 20, 21, 22, 23]
    assert mask.flatten().tolist() == [1, 3, 7, 15] * 2


def test_errors(gpu_provider: str) -> None:
    codes, cu = torch.zeros(2, 5, dtype=torch.int64), torch.zeros(3, dtype=torch.int32)
    positions, mask = torch.zeros(12, dtype=torch.int64), torch.zeros(12, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="must be \\[3\\]"):
        tree_stage(codes, cu[:2], cu, positions, mask)
    with pytest.raises(ValueError, match="row per position"):
        tree_stage(codes, cu, cu, positions, mask[:5])
    with pytest.raises(ValueError, match="more bits than the 64 nodes"):
        tree_stage(codes.new_zeros(2, 64), cu, cu, positions, mask)
    with pytest.raises(ValueError, match="int64"):
        tree_stage(codes.int(), cu, cu, positions, mask)
