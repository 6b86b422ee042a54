"""kv_commit in Triton: one launch for all caches, one program per (group, cache, chunk of a row).

A program holds its chunk of up to MOVES rows in registers, and all its threads have read before
any of them writes. Nothing but the rows is ever read or written. A table on the device, made once,
tells the caches apart.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from specplus_kernels.kv_commit.words import Words

# Chosen by arithmetic, not measured: 16 words of 8 bytes in each of 128 threads keep 16 KiB per
# program in flight in under 120 registers (compiled); a row of 2 KiB and 4 moves takes one program.
MAX_MOVES, TILE, NUM_WARPS = 16, 2048, 4
WORD_TYPES = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}


@triton.jit
def move_rows(
    data_ptr,
    block_stride,
    slot_stride,
    num_slots,
    word_at,  # [CHUNK] int64, the program's words from the start of a row
    in_row,  # [CHUNK] bool
    src_ptr,  # the group's moves
    dst_ptr,
    src_stride,
    dst_stride,
    num_moves,
    BLOCK_SIZE: tl.constexpr,
    MOVES: tl.constexpr,
):
    """Moves the words of a group's rows, MOVES rows at a time; slots out of bounds are padding."""
    for first in range(0, num_moves, MOVES):
        move = first + tl.arange(0, MOVES)
        src = tl.load(src_ptr + move * src_stride, mask=move < num_moves, other=-1)
        dst = tl.load(dst_ptr + move * dst_stride, mask=move < num_moves, other=-1)
        real = (src >= 0) & (dst >= 0) & (src < num_slots) & (dst < num_slots) & (src != dst)
        mask = real[:, None] & in_row[None, :]
        src_at = src // BLOCK_SIZE * block_stride + src % BLOCK_SIZE * slot_stride
        dst_at = dst // BLOCK_SIZE * block_stride + dst % BLOCK_SIZE * slot_stride
        words = tl.load(data_ptr + src_at[:, None] + word_at[None, :], mask=mask, other=0)
        tl.debug_barrier()  # a destination may be the source of a move that other threads read
        tl.store(data_ptr + dst_at[:, None] + word_at[None, :], words, mask=mask)


@triton.jit
def _kv_commit_kernel(
    table_ptr,  # [num_caches, 7]
    src_ptr,  # [num_groups, num_moves]
    dst_ptr,
    src_group_stride,
    src_stride,
    dst_group_stride,
    dst_stride,
    num_moves,
    num_slots,
    WORD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    MOVES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    cache_ptr = table_ptr + tl.program_id(1) * 7
    data_ptr = tl.load(cache_ptr).to(tl.pointer_type(WORD))
    run_stride, step = tl.load(cache_ptr + 3), tl.load(cache_ptr + 4)
    row_words, run_words = tl.load(cache_ptr + 5).to(tl.int32), tl.load(cache_ptr + 6).to(tl.int32)
    word = tl.program_id(2) * CHUNK + tl.arange(0, CHUNK)
    move_rows(
        data_ptr,
        tl.load(cache_ptr + 1),
        tl.load(cache_ptr + 2),
        num_slots,
        word // run_words * run_stride + word % run_words * tl.where(step == 0, 1, step),
        word < row_words,
        src_ptr + group * src_group_stride,
        dst_ptr + group * dst_group_stride,
        src_stride,
        dst_stride,
        num_moves,
        BLOCK_SIZE,
        MOVES,
    )


def tile(num_moves: int, num_words: int) -> tuple[int, int]:
    """Moves and words that a program holds at once."""
    moves = min(triton.next_power_of_2(num_moves), MAX_MOVES)
    return moves, min(triton.next_power_of_2(num_words), TILE // moves)


def kv_commit(
    words: Words,
    block_size: int,
    num_slots: int,
    src_slots: torch.Tensor,  # [num_groups, num_moves] int64
    dst_slots: torch.Tensor,
) -> None:
    """Of the caches that `words` describes; one row of slots per group of ascending moves."""
    num_groups, num_moves = src_slots.shape
    if not src_slots.numel():
        return
    moves, chunk = tile(num_moves, words.most)
    _kv_commit_kernel[num_groups, len(words.table), triton.cdiv(words.most, chunk)](
        words.table,
        src_slots,
        dst_slots,
        *src_slots.stride(),
        *dst_slots.stride(),
        num_moves,
        num_slots,
        WORD=WORD_TYPES[words.word],
        BLOCK_SIZE=block_size,
        MOVES=moves,
        CHUNK=chunk,
        num_warps=NUM_WARPS,
    )
