"""tree_grow on Triton. The package's docstring gives the formulas and the launches.

Candidates are compared as one int64, the score's order above the index's complement: ties fall to
the smaller index, and no two are equal. A scan keeps, of each of BLOCK lanes (tokens that are
equal modulo BLOCK), the best token and a running sum of exponentials; the k best of a part are then
taken one by one, and the lane that gave one is read again for its next best: k short columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from specplus_kernels.tree_grow import reference
from specplus_kernels.tree_grow.rows import TreeRows, empty_rows

NONE = tl.constexpr(-(1 << 63))
FLOOR, CEILING = tl.constexpr(reference.FLOOR), tl.constexpr(reference.CEILING)
LOW_BITS = tl.constexpr(0x7FFFFFFF)

# Chosen by arithmetic, not measured: a thread loads 4 x 8 logits at once, 64 bytes in bf16, so that
# 256 to 512 programs keep 2 to 4 MB in flight, what an H100's latency times its bandwidth asks for.
BLOCK, STEP, SCAN_WARPS, PROGRAMS = 1024, 4, 4, 512
RANK_BLOCK, RANK_STEP = 64, 128


@triton.jit
def pack(value, index):
    """A key that is larger where `value` (fp32) is, at equal values where `index` is smaller."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & LOW_BITS)
    return (ordered.to(tl.int64) << 32) | (index ^ LOW_BITS).to(tl.int64)


@triton.jit
def unpack(key):
    """Value and index; NaN and the largest index for NONE."""
    ordered = (key >> 32).to(tl.int32)
    bits = ordered ^ ((ordered >> 31) & LOW_BITS)
    return bits.to(tl.float32, bitcast=True), ((key & LOW_BITS) ^ LOW_BITS).to(tl.int32)


@triton.jit
def _load_logits(row_ptr, stride, token, end):
    x = tl.load(row_ptr + token.to(tl.int64) * stride, mask=token < end, other=float("-inf"))
    x = x.to(tl.float32)
    return tl.where(x > FLOOR, tl.minimum(x, CEILING), float("-inf"))


@triton.jit
def _scan_kernel(
    logits_ptr,
    row_stride,
    vocab_stride,
    vocab_size,
    split_size,  # a multiple of BLOCK
    keys_ptr,  # [num_rows, num_splits, K]
    maxima_ptr,  # [num_rows, num_splits]
    sums_ptr,  # [num_rows, num_splits]
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    COLUMN: tl.constexpr,
):
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part = row * tl.num_programs(1) + split
    row_ptr = logits_ptr + row * row_stride
    begin = split * split_size
    end = tl.minimum(begin + split_size, vocab_size)
    lane = tl.arange(0, BLOCK)

    best = tl.full([BLOCK], FLOOR, tl.float32)
    best_at = tl.zeros([BLOCK], tl.int32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(begin, end, STEP * BLOCK):
        token = first + tl.arange(0, STEP)[:, None] * BLOCK + lane[None, :]
        x = _load_logits(row_ptr, vocab_stride, token, end)
        value, which = tl.max(x, axis=0, return_indices=True)
        best_at = tl.where(value > best, first + which * BLOCK + lane, best_at)
        peak = tl.maximum(best, value)
        total = total * tl.exp(best - peak) + tl.sum(tl.exp(x - peak[None, :]), axis=0)
        best = peak
    maximum = tl.max(best, axis=0)
    tl.store(maxima_ptr + part, maximum)
    tl.store(sums_ptr + part, tl.sum(total * tl.exp(best - maximum), axis=0))

    keys = tl.where(best > FLOOR, pack(best, best_at), NONE)
    for i in range(K):
        top = tl.max(keys, axis=0)
        tl.store(keys_ptr + part * K + i, top)
        source = unpack(top)[1] & (BLOCK - 1)
        column = begin + source + tl.arange(0, COLUMN) * BLOCK
        x = _load_logits(row_ptr, vocab_stride, column, end)
        rest = tl.where(x > FLOOR, pack(x, column), NONE)
        rest = tl.max(tl.where(rest < top, rest, NONE), axis=0)
        keys = tl.where(lane == source, rest, keys)


@triton.jit(do_not_specialize=["start"])  # every level has its own
def _append_kernel(
    keys_ptr,  # [num_reqs, width, num_splits, K]
    maxima_ptr,  # [num_reqs, width, num_splits]
    sums_ptr,
    frontier_ptr,  # [num_reqs, width]
    frontier_stride,
    tokens_ptr,  # [num_reqs, max_candidates]
    tokens_stride,
    parents_ptr,
    parents_stride,
    scores_ptr,
    scores_stride,
    d2t_ptr,
    next_ptr,  # [num_reqs, NEXT_WIDTH]
    start,
    width,
    num_splits,
    HAS_D2T: tl.constexpr,
    K: tl.constexpr,
    NEXT_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr,  # powers of two that hold width, num_splits, num_splits * K and K
    SPLITS: tl.constexpr,
    KEYS: tl.constexpr,
    CHILDREN: tl.constexpr,
):
    req = tl.program_id(0).to(tl.int64)
    node = tl.arange(0, WIDTH)
    is_node = node < width
    row = req * width + node

    split = tl.arange(0, SPLITS)[None, :]
    at, mask = row[:, None] * num_splits + split, is_node[:, None] & (split < num_splits)
    maxima = tl.load(maxima_ptr + at, mask=mask, other=FLOOR)
    sums = tl.load(sums_ptr + at, mask=mask, other=0.0)
    peak = tl.max(maxima, axis=1)
    total = tl.sum(sums * tl.exp(maxima - peak[:, None]), axis=1)
    log_total = tl.log(tl.maximum(total, 1.0))  # below 1 only where there is no token

    key = tl.arange(0, KEYS)[None, :]
    at, mask = row[:, None] * num_splits * K + key, is_node[:, None] & (key < num_splits * K)
    keys = tl.load(keys_ptr + at, mask=mask, other=NONE)
    child = tl.arange(0, CHILDREN)[None, :]
    best = tl.full([WIDTH, CHILDREN], NONE, tl.int64)
    for i in range(K):
        top = tl.max(keys, axis=1)[:, None]
        best = tl.where(child == i, top, best)
        keys = tl.where(keys == top, NONE, keys)

    frontier = tl.load(frontier_ptr + req * frontier_stride + node, mask=is_node, other=-1)
    above_ptr = scores_ptr + req * scores_stride + frontier
    above = tl.load(above_ptr, mask=is_node & (frontier >= 0), other=0.0)
    value, token = unpack(best)
    score = above[:, None] + (value - peak[:, None] - log_total[:, None])
    score = tl.where(best == NONE, float("-inf"), score)
    exists = score > float("-inf")
    if HAS_D2T:
        token = tl.load(d2t_ptr + token, mask=exists, other=0)
    candidate = start + node[:, None] * K + child
    is_child = is_node[:, None] & (child < K)
    token = tl.where(exists, token, 0)
    tl.store(tokens_ptr + req * tokens_stride + candidate, token, mask=is_child)
    parent = tl.broadcast_to(frontier[:, None], WIDTH, CHILDREN)
    tl.store(parents_ptr + req * parents_stride + candidate, parent, mask=is_child)
    tl.store(scores_ptr + req * scores_stride + candidate, score, mask=is_child)

    order = tl.where(is_child, pack(score, candidate), NONE)
    for i in range(NEXT_WIDTH):
        top = tl.max(tl.max(order, axis=1), axis=0)
        tl.store(next_ptr + req * NEXT_WIDTH + i, unpack(top)[1])
        order = tl.where(order == top, NONE, order)


@triton.jit
def _rank_kernel(
    scores_ptr,
    scores_stride,
    num_candidates,
    rank_ptr,  # [num_reqs, num_candidates]
    order_ptr,  # [num_reqs, num_candidates]
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    req = tl.program_id(0).to(tl.int64)
    scores_ptr += req * scores_stride
    own = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    own_key = pack(tl.load(scores_ptr + own, mask=own < num_candidates, other=0.0), own)
    rank = tl.zeros([BLOCK], tl.int32)
    for first in range(0, num_candidates, STEP):
        other = first + tl.arange(0, STEP)
        is_other = other < num_candidates
        key = pack(tl.load(scores_ptr + other, mask=is_other, other=0.0), other)
        key = tl.where(is_other, key, NONE)
        rank += tl.sum((key[None, :] > own_key[:, None]).to(tl.int32), axis=1)
    tl.store(rank_ptr + req * num_candidates + own, rank, mask=own < num_candidates)
    tl.store(order_ptr + req * num_candidates + rank, own, mask=own < num_candidates)


@triton.jit
def write_tree(
    token,  # [ROWS], anything at the root and at padding
    parent,  # [ROWS] rows, likewise
    num_nodes,
    tokens_ptr,  # contiguous, as in TreeRows
    parents_ptr,
    depths_ptr,
    ancestor_mask_ptr,
    num_nodes_ptr,
    num_rows,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    DOUBLINGS: tl.constexpr,  # log2 of the longest path's rows, rounded up
):
    """Writes one request's rows; depths and ancestors by pointer doubling.

    After i rounds a row knows the nearest 2^i of its path, itself included, and points to the next.
    """
    req = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, ROWS)
    is_node = (row > 0) & (row <= num_nodes)
    parent = tl.where(is_node, parent, 0).to(tl.int32)
    bit = tl.full([ROWS], 1, tl.int64) << (row % 64).to(tl.int64)
    word = tl.arange(0, WORDS)[None, :]
    ancestors = tl.where((row // 64)[:, None] == word, bit[:, None], 0)
    above, depth = parent, is_node.to(tl.int32)
    for _ in tl.static_range(DOUBLINGS):
        above_words = tl.broadcast_to(above[:, None], ROWS, WORDS)
        ancestors |= tl.gather(ancestors, above_words, axis=0)
        depth += tl.gather(depth, above, axis=0)
        above = tl.gather(above, above, axis=0)
    at = req * num_rows + row
    is_row = row < num_rows
    tl.store(tokens_ptr + at, tl.where(is_node, token, -1), mask=is_row)
    tl.store(parents_ptr + at, tl.where(row == 0, -1, parent), mask=is_row)
    tl.store(depths_ptr + at, depth, mask=is_row)
    ancestors = tl.where((row <= num_nodes)[:, None], ancestors, 0)
    words_at = at[:, None] * WORDS + word
    tl.store(ancestor_mask_ptr + words_at, ancestors, mask=is_row[:, None])
    tl.store(num_nodes_ptr + req, num_nodes)


@triton.jit
def _tree_kernel(
    tokens_ptr,
    tokens_stride,
    parents_ptr,
    parents_stride,
    scores_ptr,
    scores_stride,
    rank_ptr,
    order_ptr,
    num_candidates,
    min_score,
    out_tokens_ptr,
    out_parents_ptr,
    out_depths_ptr,
    out_ancestor_mask_ptr,
    out_num_nodes_ptr,
    num_rows,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    DOUBLINGS: tl.constexpr,
):
    req = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, ROWS)
    filled = (row > 0) & (row < num_rows) & (row <= num_candidates)
    candidate = tl.load(order_ptr + req * num_candidates + row - 1, mask=filled, other=0)
    score_ptr = scores_ptr + req * scores_stride + candidate
    score = tl.load(score_ptr, mask=filled, other=float("-inf"))
    is_node = (score >= min_score) & (score > float("-inf"))
    token = tl.load(tokens_ptr + req * tokens_stride + candidate, mask=is_node, other=0)
    parent = tl.load(parents_ptr + req * parents_stride + candidate, mask=is_node, other=-1)
    rank = tl.load(rank_ptr + req * num_candidates + parent, mask=parent >= 0, other=-1)
    write_tree(
        token,
        rank + 1,
        tl.sum(is_node.to(tl.int32), axis=0),
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


def expand(
    logits: torch.Tensor,
    frontier: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    scores: torch.Tensor,
    *,
    start: int,
    k: int,
    next_width: int,
    d2t: torch.Tensor | None,
) -> torch.Tensor:
    """As the reference."""
    num_reqs, width = frontier.shape
    next_frontier = frontier.new_empty(num_reqs, next_width)
    if not num_reqs:
        return next_frontier
    keys, maxima, sums = _scan(logits, k)
    num_splits = maxima.shape[1]
    padded_width, padded_keys = map(triton.next_power_of_2, (width, num_splits * k))
    _append_kernel[(num_reqs,)](
        keys,
        maxima,
        sums,
        frontier,
        frontier.stride(0),
        tokens,
        tokens.stride(0),
        parents,
        parents.stride(0),
        scores,
        scores.stride(0),
        tokens if d2t is None else d2t,
        next_frontier,
        start,
        width,
        num_splits,
        HAS_D2T=d2t is not None,
        K=k,
        NEXT_WIDTH=next_width,
        WIDTH=padded_width,
        SPLITS=triton.next_power_of_2(num_splits),
        KEYS=padded_keys,
        CHILDREN=triton.next_power_of_2(k),
        num_warps=8 if padded_width * padded_keys > 2048 else 4,
    )
    return next_frontier


def _scan(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each part of the rows: the k best keys, the maximum, the sum of exponentials over it."""
    num_rows, vocab_size = logits.shape
    split_size, num_splits = _split(num_rows, vocab_size)
    maxima = torch.empty(num_rows, num_splits, dtype=torch.float32, device=logits.device)
    sums = torch.empty_like(maxima)
    keys = torch.empty(num_rows, num_splits, k, dtype=torch.int64, device=logits.device)
    _scan_kernel[num_rows, num_splits](
        logits,
        *logits.stride(),
        vocab_size,
        split_size,
        keys,
        maxima,
        sums,
        K=k,
        BLOCK=BLOCK,
        STEP=STEP,
        COLUMN=triton.next_power_of_2(split_size // BLOCK),
        num_warps=SCAN_WARPS,
    )
    return keys, maxima, sums


def _split(num_rows: int, vocab_size: int) -> tuple[int, int]:
    """Tokens per program and programs per row: a power of two of whole tiles or fewer."""
    tiles = triton.cdiv(vocab_size, BLOCK * STEP)
    wanted = 1 << (max(PROGRAMS // num_rows, 1).bit_length() - 1)
    tiles_each = triton.cdiv(tiles, wanted)
    return tiles_each * BLOCK * STEP, triton.cdiv(tiles, tiles_each)


def rerank(
    tokens: torch.Tensor,
    parents: torch.Tensor,
    scores: torch.Tensor,
    *,
    num_nodes: int,
    min_score: float,
) -> TreeRows:
    """As the reference."""
    num_reqs, num_candidates = tokens.shape
    rows = empty_rows(num_reqs, num_nodes, tokens.device)
    if not num_reqs:
        return rows
    rank = torch.empty(tokens.shape, dtype=torch.int32, device=tokens.device)
    order = torch.empty_like(rank)
    _rank_kernel[num_reqs, triton.cdiv(num_candidates, RANK_BLOCK)](
        scores,
        scores.stride(0),
        num_candidates,
        rank,
        order,
        BLOCK=RANK_BLOCK,
        STEP=RANK_STEP,
    )
    _tree_kernel[(num_reqs,)](
        tokens,
        tokens.stride(0),
        parents,
        parents.stride(0),
        scores,
        scores.stride(0),
        rank,
        order,
        num_candidates,
        min_score,
        *rows,
        num_nodes + 1,
        ROWS=triton.next_power_of_2(num_nodes + 1),
        WORDS=rows.ancestor_mask.shape[2],
        DOUBLINGS=num_nodes.bit_length(),
    )
    return rows
