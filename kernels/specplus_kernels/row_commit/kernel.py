"""row_commit in Triton: one launch, one program per (request, tensor, chunk of a row).

The tensors are a tuple, so the kernel is compiled with the type and the alignment of each; rows
become words as wide as they allow. Reading and writing is kv_commit's.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch
import triton
import triton.language as tl

from specplus_kernels.kv_commit.kernel import NUM_WARPS, move_rows, tile
from specplus_kernels.kv_commit.words import MAX_WORD

INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


@triton.jit
def _row_commit_kernel(
    tensors,  # tuple of [num_rows, num_words]
    strides,  # tuple of (row stride, word stride, num_words)
    src_ptr,  # [num_groups, num_moves]
    dst_ptr,
    src_group_stride,
    src_stride,
    dst_group_stride,
    dst_stride,
    num_moves,
    num_rows,
    NUM_TENSORS: tl.constexpr,
    MOVES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    word = tl.program_id(2) * CHUNK + tl.arange(0, CHUNK).to(tl.int64)
    for i in tl.static_range(NUM_TENSORS):
        if tl.program_id(1) == i:
            row_stride, word_stride, num_words = strides[i]
            if tl.program_id(2) * CHUNK < num_words:
                move_rows(
                    tensors[i],
                    row_stride,
                    0,
                    num_rows,
                    word * word_stride,
                    word < num_words,
                    src_ptr + group * src_group_stride,
                    dst_ptr + group * dst_group_stride,
                    src_stride,
                    dst_stride,
                    num_moves,
                    1,
                    MOVES,
                )


def row_commit(
    tensors: Sequence[torch.Tensor],
    src_rows: torch.Tensor,  # [num_groups, num_moves] int64
    dst_rows: torch.Tensor,
) -> None:
    """As the reference; one row of moves per group of ascending moves."""
    num_groups, num_moves = src_rows.shape
    num_rows = len(tensors[0])
    if not src_rows.numel() or not num_rows:
        return
    rows = tuple(_as_words(tensor.view(num_rows, -1)) for tensor in tensors)
    most = max(words.shape[1] for words in rows)
    moves, chunk = tile(num_moves, most)
    _row_commit_kernel[num_groups, len(rows), triton.cdiv(most, chunk)](
        rows,
        tuple((*words.stride(), words.shape[1]) for words in rows),
        src_rows,
        dst_rows,
        *src_rows.stride(),
        *dst_rows.stride(),
        num_moves,
        num_rows,
        NUM_TENSORS=len(rows),
        MOVES=moves,
        CHUNK=chunk,
        num_warps=NUM_WARPS,
    )


def _as_words(rows: torch.Tensor) -> torch.Tensor:
    """The same bytes as the widest integers that alignment and contiguity allow."""
    size = rows.element_size()
    if rows.stride(1) == 1:
        row_bytes = rows.shape[1] * size
        size = gcd(MAX_WORD, rows.data_ptr(), rows.stride(0) * size, row_bytes)
    return rows.view(INTEGERS[size])
