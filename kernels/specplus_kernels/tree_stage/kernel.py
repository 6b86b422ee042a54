"""tree_stage on Triton: one program per request, everything in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MIN_DOT = 16  # the least side of a matrix product


@triton.jit
def _tree_stage_kernel(
    codes_ptr,
    codes_stride,
    query_start_loc_ptr,
    cu_num_rows_ptr,
    positions_ptr,
    ancestor_mask_ptr,
    mask_stride,
    ROWS: tl.constexpr,
    SQUARINGS: tl.constexpr,
    WORDS: tl.constexpr,
):
    req = tl.program_id(0).to(tl.int64)
    num_rows = tl.load(cu_num_rows_ptr + req + 1) - tl.load(cu_num_rows_ptr + req)
    if num_rows <= 0:
        return
    first = (tl.load(query_start_loc_ptr + req + 1) - num_rows).to(tl.int64)
    root_position = tl.load(positions_ptr + first)

    row = tl.arange(0, ROWS)
    is_row = row < num_rows
    is_node = is_row & (row > 0)
    code = tl.load(codes_ptr + req * codes_stride + row - 1, mask=is_node, other=0)
    parent = row - 1 - tl.maximum(code >> 32, 0)
    column = row[None, :]
    own = column == row[:, None]
    above = is_node[:, None] & (column == parent[:, None])
    seen = (own | above).to(tl.float16)
    for _ in tl.static_range(SQUARINGS):
        seen = (tl.dot(seen, seen) > 0).to(tl.float16)

    depth = tl.sum(seen.to(tl.float32), axis=1).to(tl.int64) - 1
    tl.store(positions_ptr + first + row, root_position + depth, mask=is_row)
    bit = tl.full([1, ROWS], 1, tl.int64) << (column % 64).to(tl.int64)
    for word in tl.static_range(WORDS):
        in_word = (seen > 0) & (column // 64 == word)
        words = tl.sum(tl.where(in_word, bit, 0), axis=1)
        tl.store(ancestor_mask_ptr + (first + row) * mask_stride + word, words, mask=is_row)


def tree_stage(
    codes: torch.Tensor,
    query_start_loc: torch.Tensor,
    cu_num_rows: torch.Tensor,
    positions: torch.Tensor,
    ancestor_mask: torch.Tensor,
) -> None:
    """As the reference."""
    num_reqs, max_nodes = codes.shape
    rows = max(MIN_DOT, triton.next_power_of_2(max_nodes + 1))
    _tree_stage_kernel[(num_reqs,)](
        codes,
        codes.stride(0),
        query_start_loc,
        cu_num_rows,
        positions,
        ancestor_mask,
        ancestor_mask.stride(0),
        ROWS=rows,
        # Ancestors at 1, 2, 4, ... steps; the deepest tree is a chain.
        SQUARINGS=(max_nodes - 1).bit_length() if max_nodes else 0,
        WORDS=ancestor_mask.shape[1],
        # By arithmetic: the sums of a product of 128 x 128 take 64 registers of a thread.
        num_warps=8 if rows > 64 else 4,
    )
