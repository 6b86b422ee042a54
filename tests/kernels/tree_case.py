"""What the rows of a batch of trees must be, in plain Python."""

from __future__ import annotations

from typing import NamedTuple

from specplus_kernels.tree_grow import TreeRows


class Tree(NamedTuple):
    """Tokens and parents of nodes 1, 2, ...; a parent is a row, 0 the root."""

    tokens: list[int]
    parents: list[int]


def assert_rows(rows: TreeRows, trees: list[Tree], num_nodes: int) -> None:
    """The rows are these trees, padded."""
    num_rows = num_nodes + 1
    assert rows.ancestor_mask.shape == (len(trees), num_rows, -(-num_rows // 64))
    for req, (tokens, parents) in enumerate(trees):
        assert len(set(zip(parents, tokens, strict=True))) == len(tokens)  # siblings differ
        depths, ancestors = [0], [1]
        for row, parent in enumerate(parents, start=1):
            assert 0 <= parent < row
            depths.append(depths[parent] + 1)
            ancestors.append(ancestors[parent] | 1 << row)
        padding = [0] * (num_nodes - len(tokens))
        assert rows.num_nodes[req].item() == len(tokens)
        assert rows.tokens[req].tolist() == [-1, *tokens, *(-1 for _ in padding)]
        assert rows.parents[req].tolist() == [-1, *parents, *padding]
        assert rows.depths[req].tolist() == [*depths, *padding]
        words = rows.ancestor_mask[req].tolist()
        masks = [sum((word % 2**64) << 64 * w for w, word in enumerate(row)) for row in words]
        assert masks == [*ancestors, *padding]
