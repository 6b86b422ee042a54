"""tree_stage in plain torch, row by row."""

from __future__ import annotations

import torch

from specplus_kernels.tree_grow.rows import WORD_BITS

TOKEN_BITS = 32


def tree_stage(
    codes: torch.Tensor,
    query_start_loc: torch.Tensor,
    cu_num_rows: torch.Tensor,
    positions: torch.Tensor,
    ancestor_mask: torch.Tensor,
) -> None:
    """See the package's docstring."""
    ends, num_rows = query_start_loc.tolist()[1:], cu_num_rows.diff().tolist()
    for req, (end, rows) in enumerate(zip(ends, num_rows, strict=True)):
        masks, depths = [1], [0]
        for row, code in enumerate(codes[req, : max(0, rows - 1)].tolist(), start=1):
            parent = row - 1 - max(0, code >> TOKEN_BITS)
            masks.append(masks[parent] | 1 << row)
            depths.append(depths[parent] + 1)
        if rows:
            tree = slice(end - rows, end)
            positions[tree] = positions[tree.start] + torch.tensor(depths, device=positions.device)
            ancestor_mask[tree] = _words(masks, ancestor_mask)


def _words(masks: list[int], like: torch.Tensor) -> torch.Tensor:
    """Python bitmasks as int64 words: [len(masks), words]."""
    words = [
        [(mask >> WORD_BITS * w) & ((1 << WORD_BITS) - 1) for w in range(like.shape[1])]
        for mask in masks
    ]
    signed = [[word - (1 << WORD_BITS) if word >> 63 else word for word in row] for row in words]
    return torch.tensor(signed, dtype=torch.int64, device=like.device)
