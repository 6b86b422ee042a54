"""row_commit: moves the rows of accepted nodes to the front of their request, in several tensors.

    for each request, each of its moves i, in order, and each tensor x:  x[dst[i]] = x[src[i]]

What kv_commit does to slots of a paged cache, for hidden and auxiliary states, token ids and
positions, all in one launch. kv_commit tells why no move destroys what a later one reads, and what
is asked of the moves; no two of the tensors may overlap.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specplus_kernels import dispatch
from specplus_kernels.row_commit import reference

__all__ = ["row_commit"]


def row_commit(
    tensors: Sequence[torch.Tensor], src_rows: torch.Tensor, dst_rows: torch.Tensor
) -> None:
    """Moves whole rows in place, bit by bit.

    Args:
        tensors: [num_rows, ...] each, of one num_rows, any dtype and any stride of the rows; what
            follows the first dimension must be viewable as one.
        src_rows: [num_moves] or [num_reqs, max_moves] int64, ascending per request, negative =
            padding. Only rows of a matrix run side by side on a GPU.
        dst_rows: as src_rows.

    Raises:
        ValueError: the tensors differ in rows, or the moves are not two int64 tensors of one shape.

    """
    if len({len(tensor) for tensor in tensors}) != 1:
        sizes = [len(tensor) for tensor in tensors]
        raise ValueError(f"tensors must be at least one, of one number of rows, got {sizes}")
    if src_rows.dtype != torch.int64 or dst_rows.dtype != torch.int64:
        raise ValueError(f"rows must be int64, got {src_rows.dtype} and {dst_rows.dtype}")
    if src_rows.dim() not in (1, 2) or src_rows.shape != dst_rows.shape:
        raise ValueError(
            f"src_rows {tuple(src_rows.shape)} and dst_rows {tuple(dst_rows.shape)} must be of one "
            "shape, [num_moves] or [num_reqs, max_moves]"
        )
    which = dispatch.provider(tensors[0].device)
    if which == "triton":
        from specplus_kernels.row_commit import kernel

        kernel.row_commit(tensors, *torch.atleast_2d(src_rows, dst_rows))
    else:
        reference.row_commit(tensors, src_rows, dst_rows)
