"""What the rows of a batch of trees must be, by core.tree's plain Python."""

from __future__ import annotations

from specplus_kernels.tree_grow import TreeRows

from vllm_specplus.core.tree import Tree


def assert_rows(rows: TreeRows, trees: list[Tree], num_nodes: int) -> None:
    """The rows are these trees, padded."""
    num_rows = num_nodes + 1
    assert rows.ancestor_mask.shape == (len(trees), num_rows, -(-num_rows // 64))
    for req, tree in enumerate(trees):
        tree.validate()
        padding = [0] * (num_nodes - len(tree))
        assert rows.num_nodes[req].item() == len(tree)
        assert rows.tokens[req].tolist() == [-1, *tree.tokens, *(-1 for _ in padding)]
        assert rows.parents[req].tolist() == [-1, *tree.parents, *padding]
        assert rows.depths[req].tolist() == [*tree.depths(), *padding]
        words = rows.ancestor_mask[req].tolist()
        masks = [sum((word % 2**64) << 64 * w for w, word in enumerate(row)) for row in words]
        assert masks == [*tree.ancestors(), *padding]
