"""ngram_match on Triton. The package's docstring tells what the two kernels do.

A match is one int64, its length above the position it ends at: the larger is the better one, and no
two are equal.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from specplus_kernels.tree_grow.kernel import write_tree
from specplus_kernels.tree_grow.rows import TreeRows, empty_rows

# Chosen by arithmetic, not measured: 16 keys in each of 128 threads take 32 registers, and 8
# histories of 32k tokens make 128 programs, one for each SM of an H100.
BLOCK, NUM_WARPS = 2048, 4
NONE = tl.constexpr(-1)


@triton.jit
def _match_kernel(
    tokens_ptr,  # [num_slots, max_len]
    tokens_stride,
    token_stride,
    lens_ptr,
    idx_mapping_ptr,
    matches_ptr,  # [num_reqs, num_parts, NUM_MATCHES]
    MIN_N: tl.constexpr,
    MAX_N: tl.constexpr,
    NUM_MATCHES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    req, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(idx_mapping_ptr + req).to(tl.int64)
    last = tl.load(lens_ptr + slot).to(tl.int64) - 1
    tokens_ptr += slot * tokens_stride
    matches_ptr += (req * tl.num_programs(1) + part) * NUM_MATCHES
    end = part * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    if part * BLOCK >= last:
        for i in range(NUM_MATCHES):
            tl.store(matches_ptr + i, NONE)
        return
    alive, length = end < last, tl.zeros([BLOCK], tl.int64)
    for n in tl.static_range(MAX_N):
        alive &= end >= n
        token = tl.load(tokens_ptr + (end - n) * token_stride, mask=alive, other=0)
        alive &= token == tl.load(tokens_ptr + (last - n) * token_stride, mask=last >= n, other=0)
        length += alive.to(tl.int64)
    key = tl.where(length >= MIN_N, (length << 32) | end, NONE)
    for i in range(NUM_MATCHES):
        best = tl.max(key, axis=0)
        tl.store(matches_ptr + i, best)
        key = tl.where(key == best, NONE, key)


@triton.jit
def _merge_kernel(
    tokens_ptr,
    tokens_stride,
    token_stride,
    lens_ptr,
    idx_mapping_ptr,
    matches_ptr,  # [num_reqs, num_keys]
    num_keys,
    out_tokens_ptr,
    out_parents_ptr,
    out_depths_ptr,
    out_ancestor_mask_ptr,
    out_num_nodes_ptr,
    num_rows,
    MAX_DEPTH: tl.constexpr,
    NUM_MATCHES: tl.constexpr,
    KEYS: tl.constexpr,  # powers of two that hold num_keys, NUM_MATCHES and num_rows
    MATCHES: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    DOUBLINGS: tl.constexpr,
):
    req = tl.program_id(0).to(tl.int64)
    slot = tl.load(idx_mapping_ptr + req).to(tl.int64)
    history_len = tl.load(lens_ptr + slot).to(tl.int64)
    tokens_ptr += slot * tokens_stride
    key = tl.arange(0, KEYS)
    keys = tl.load(matches_ptr + req * num_keys + key, mask=key < num_keys, other=NONE)
    match = tl.arange(0, MATCHES)
    best = tl.full([MATCHES], NONE, tl.int64)
    for i in range(NUM_MATCHES):
        top = tl.max(keys, axis=0)
        best = tl.where(match == i, top, best)
        keys = tl.where(keys == top, NONE, keys)

    # What each match is followed by, and how much of that each pair has in common.
    begin = (best & 0x7FFFFFFF) + 1
    num_after = tl.minimum(history_len - begin, MAX_DEPTH)
    num_after = tl.where(best == NONE, 0, num_after).to(tl.int32)
    alike = match[:, None] > match[None, :]
    common = tl.zeros([MATCHES, MATCHES], tl.int32)
    for depth in range(MAX_DEPTH):
        here = depth < num_after
        token = tl.load(tokens_ptr + (begin + depth) * token_stride, mask=here, other=0)
        alike &= (token[:, None] == token[None, :]) & here[:, None] & here[None, :]
        common += alike.to(tl.int32)

    # Each match's own rows, and the row of an earlier match that they hang below.
    shared = tl.max(common, axis=1)
    own = num_after - shared
    earlier = match[:, None] > match[None, :]
    before = tl.sum(tl.where(earlier, own[None, :], 0), axis=1)
    holder = tl.where(earlier & (common == shared[:, None]), match[None, :], MATCHES)
    is_holder = match[None, :] == tl.min(holder, axis=1)[:, None]
    hook = tl.where(is_holder, before[None, :] + shared[:, None] - shared[None, :], 0)
    hook = tl.where(shared == 0, 0, tl.sum(hook, axis=1))

    row = tl.arange(0, ROWS)
    order = row[:, None] - 1 - before[None, :]
    mine = (order >= 0) & (order < own[None, :])
    at = tl.where(mine, begin[None, :] + shared[None, :] + order, 0)
    parent = tl.where(mine, tl.where(order == 0, hook[None, :], row[:, None] - 1), 0)
    num_nodes = tl.minimum(tl.sum(own, axis=0), num_rows - 1)
    is_node = (row > 0) & (row <= num_nodes)
    token = tl.load(tokens_ptr + tl.sum(at, axis=1) * token_stride, mask=is_node, other=0)
    write_tree(
        token.to(tl.int64),
        tl.sum(parent, axis=1),
        num_nodes,
        out_tokens_ptr,
        out_parents_ptr,
        out_depths_ptr,
        out_ancestor_mask_ptr,
        out_num_nodes_ptr,
        num_rows,
        ROWS,
        WORDS,
        DOUBLINGS,
    )


def ngram_match(
    tokens: torch.Tensor,
    lens: torch.Tensor,
    idx_mapping: torch.Tensor,
    *,
    min_n: int,
    max_n: int,
    num_nodes: int,
    max_depth: int,
    max_matches: int,
) -> TreeRows:
    """As the reference."""
    num_reqs, num_parts = len(idx_mapping), triton.cdiv(max(tokens.shape[1], 1), BLOCK)
    rows = empty_rows(num_reqs, num_nodes, tokens.device)
    if not num_reqs:
        return rows
    shape = num_reqs, num_parts, max_matches
    matches = torch.empty(shape, dtype=torch.int64, device=tokens.device)
    histories = tokens, *tokens.stride(), lens, idx_mapping
    _match_kernel[num_reqs, num_parts](
        *histories,
        matches,
        MIN_N=min_n,
        MAX_N=max_n,
        NUM_MATCHES=max_matches,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    num_keys = num_parts * max_matches
    _merge_kernel[(num_reqs,)](
        *histories,
        matches,
        num_keys,
        *rows,
        num_nodes + 1,
        MAX_DEPTH=max_depth,
        NUM_MATCHES=max_matches,
        KEYS=triton.next_power_of_2(num_keys),
        MATCHES=triton.next_power_of_2(max_matches),
        ROWS=triton.next_power_of_2(num_nodes + 1),
        WORDS=rows.ancestor_mask.shape[2],
        DOUBLINGS=min(num_nodes, max_depth).bit_length(),
        num_warps=NUM_WARPS,
    )
    return rows
