"""tree_attention in Triton; the same kernel serves tree_attention_mla. The formula: __init__.py.

Grid of `_tree_attention_kernel`: (splits x row tiles, KV heads, requests). A tile packs the rows of
a request times the heads that share a KV head, so that KV is read once for all of them. Its slots
are cut into tiles of BLOCK_N: in the *full* ones every row sees every slot, so they need no mask;
the *masked* ones hold the edge of the sliding window, the end of the context and the tail. Split k
takes the k-th share of the tiles that there are, not of those that the block table could hold; a
program without rows returns. The softmax is online and in base 2. With more than one split, each
stores its normalised result and log-sum-exp, and `_combine_kernel` weighs them (flash-decoding:
Dao et al. 2023; rows of a group packed as in FlashInfer: Ye et al. 2025, arXiv 2501.01005).

A head is MAIN + REST dims, both padded to powers of two: 80 = 64 + 16, 192 = 128 + 64, and a
latent head 576 = 512 + 64, whose values are the MAIN dims of its keys (LATENT), loaded once.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from specplus_kernels.tree_attention.reference import WORD_BITS

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2E = tl.constexpr(1.4426950408889634)
DEFAULT_SMS = 132  # where no GPU tells: offline compilation and the interpreter
PROGRAMS_PER_SM = 2
MAX_SPLITS = 64
COMBINE_TILE = 4096  # rows x splits x dims of a program, 32 registers of a thread
OPTIONAL = ("tail_lens", "tail_positions", "requests", "sinks", "k_scale", "v_scale")


@triton.jit
def _decode(tile, dtype: tl.constexpr):
    """fp8 (e4m3) comes as bytes, as Triton has that type on sm_89 and newer only."""
    if tile.dtype == tl.uint8:
        byte = tile.to(tl.int32)
        bits = ((byte & 0x80) << 24) | ((byte & 0x7F) << 20)
        exact = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^(127 - 7)
        return tl.where((byte & 0x7F) == 0x7F, float("nan"), exact).to(dtype)
    return tile.to(dtype)


@triton.jit
def _load(
    ptr, offsets, valid, dim_stride, dtype: tl.constexpr,
    FIRST: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Dims FIRST to FIRST + SIZE at `offsets`, [len(offsets), PADDED]; 0 where not valid."""
    dims = tl.arange(0, PADDED)
    mask = valid[:, None]
    if SIZE != PADDED:
        mask = mask & (dims < SIZE)[None, :]
    pointers = ptr + offsets[:, None] + (FIRST + dims)[None, :] * dim_stride
    return _decode(tl.load(pointers, mask=mask, other=0), dtype)


@triton.jit
def _dot(a, b, acc):
    if INTERPRETED:  # Triton's interpreter would multiply the bits of bf16 as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _store(ptr, offsets, valid, dim_stride, tile, FIRST: tl.constexpr, SIZE: tl.constexpr):
    dims = tl.arange(0, tile.shape[1])
    pointers = ptr + offsets[:, None] + (FIRST + dims)[None, :] * dim_stride
    mask = valid[:, None] & (dims < SIZE)[None, :]
    tl.store(pointers, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rows(query_start_loc_ptr, requests_ptr, HAS_REQUESTS: tl.constexpr):
    """The request of this program, its first row and its number of rows."""
    req = tl.program_id(2)
    if HAS_REQUESTS:
        req = tl.load(requests_ptr + req)
    start = tl.load(query_start_loc_ptr + req)
    return req, start, tl.load(query_start_loc_ptr + req + 1) - start


@triton.jit
def _visible(
    first, context, end, words_ptr, word_stride, num_words, real, oldest, tail_positions_ptr,
    BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Which of the at most 32 slots from `first` on each row sees, [rows, BLOCK_N]."""
    # The words before the tail, of the committed slots, are all ones.
    bit = tl.maximum(first - context, -64)
    index = (bit + 64) // 64 - 1
    low = tl.load(words_ptr + tl.maximum(index, 0) * word_stride, mask=real, other=0)
    low = tl.where(index < 0, -1, low).to(tl.uint64, bitcast=True)
    last = num_words - 1  # the bits past it are those of no slot
    high = tl.load(words_ptr + tl.minimum(index + 1, last) * word_stride, mask=real, other=0)
    shift = (bit - index * 64).to(tl.uint64)
    bits = (low >> shift) | (high.to(tl.uint64, bitcast=True) << 1 << (63 - shift))
    lanes = tl.arange(0, BLOCK_N)
    slots = first + lanes
    visible = ((bits.to(tl.uint32)[:, None] >> lanes.to(tl.uint32)[None, :]) & 1) != 0
    visible = visible & (slots < end)[None, :]
    if HAS_WINDOW:
        in_tail = (slots >= context) & (slots < end)
        positions = tl.load(tail_positions_ptr + slots - context, mask=in_tail, other=0)
        positions = tl.where(in_tail, positions.to(tl.int32), slots)
        visible = visible & (positions[None, :] >= oldest[:, None])
    return visible


@triton.jit
def _attend(
    acc, acc_rest, peak, norm, query, query_rest, first, context, end,
    key_ptr, value_ptr, block_table_ptr, words_ptr, tail_positions_ptr, real, oldest,
    score_scale, soft_cap, word_stride, num_words,
    key_block_stride, key_slot_stride, key_dim_stride,
    value_block_stride, value_slot_stride, value_dim_stride,
    BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    MAIN: tl.constexpr, REST: tl.constexpr, PADDED: tl.constexpr,
    LATENT: tl.constexpr, HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The online softmax with one more tile of slots."""
    dtype: tl.constexpr = query.dtype
    slots = first + tl.arange(0, BLOCK_N)
    valid = slots < end if MASKED else tl.full(slots.shape, True, tl.int1)
    block = tl.load(block_table_ptr + slots // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
    inside = slots % BLOCK_SIZE
    key_at = block * key_block_stride + inside * key_slot_stride
    value_at = block * value_block_stride + inside * value_slot_stride

    key = _load(key_ptr, key_at, valid, key_dim_stride, dtype, 0, MAIN, MAIN)
    value = key
    if not LATENT:  # here already, so that both loads fly together
        value = _load(value_ptr, value_at, valid, value_dim_stride, dtype, 0, MAIN, MAIN)
    scores = tl.zeros([query.shape[0], BLOCK_N], tl.float32)
    scores = _dot(query, tl.trans(key), scores)
    if REST:
        key_rest = _load(key_ptr, key_at, valid, key_dim_stride, dtype, MAIN, REST, PADDED)
        scores = _dot(query_rest, tl.trans(key_rest), scores)
    scores *= score_scale
    if HAS_CAP:  # score_scale holds 2 log2(e) / cap: tanh(x) = 1 - 2 / (e^2x + 1)
        scores = soft_cap * LOG2E * (1 - 2 / (tl.exp2(scores) + 1))
    if MASKED:
        visible = _visible(
            first, context, end, words_ptr, word_stride, num_words, real, oldest,
            tail_positions_ptr, BLOCK_N, HAS_WINDOW,
        )  # fmt: skip
        scores = tl.where(visible, scores, float("-inf"))

    new_peak = tl.maximum(peak, tl.max(scores, 1))
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak) if MASKED else new_peak
    weights = tl.exp2(scores - base[:, None])
    decay = tl.exp2(peak - base)
    norm = norm * decay + tl.sum(weights, 1)
    weights = weights.to(dtype)

    if MASKED:
        value, norm = _keep_garbage_out(value, norm, visible)
    acc = _dot(weights, value, acc * decay[:, None])
    if REST and not LATENT:
        rest = _load(value_ptr, value_at, valid, value_dim_stride, dtype, MAIN, REST, PADDED)
        if MASKED:
            rest, norm = _keep_garbage_out(rest, norm, visible)
        acc_rest = _dot(weights, rest, acc_rest * decay[:, None])
    return acc, acc_rest, new_peak, norm


@triton.jit
def _keep_garbage_out(value, norm, visible):
    """A value that is not finite makes NaN of the rows that see it, and of no other (0 * NaN)."""
    finite = tl.abs(value.to(tl.float32)) < float("inf")
    garbage = tl.min(finite.to(tl.int32), 1) == 0
    touched = tl.max((visible & garbage[None, :]).to(tl.int32), 1) > 0
    return tl.where(finite, value, 0.0).to(value.dtype), tl.where(touched, float("nan"), norm)


@triton.jit
def _tree_attention_kernel(
    out_ptr, partial_ptr, lse_ptr, query_ptr, key_ptr, value_ptr, block_table_ptr,
    query_start_loc_ptr, context_lens_ptr, tail_lens_ptr, ancestor_mask_ptr, positions_ptr,
    tail_positions_ptr, requests_ptr, sinks_ptr, k_scale_ptr, v_scale_ptr,
    scale, soft_cap, window, num_words, num_row_tiles, num_splits,
    out_token_stride, out_head_stride, out_dim_stride,
    query_token_stride, query_head_stride, query_dim_stride,
    key_block_stride, key_slot_stride, key_head_stride, key_dim_stride,
    value_block_stride, value_slot_stride, value_head_stride, value_dim_stride,
    block_table_stride, mask_row_stride, word_stride, tail_positions_stride,
    GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    PADDED: tl.constexpr, LATENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    HAS_TAIL_LENS: tl.constexpr, HAS_TAIL_POSITIONS: tl.constexpr, HAS_REQUESTS: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_K_SCALE: tl.constexpr, HAS_V_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    row_tile, split = tl.program_id(0) % num_row_tiles, tl.program_id(0) // num_row_tiles
    kv_head = tl.program_id(1).to(tl.int64)
    req, start, num_rows = _rows(query_start_loc_ptr, requests_ptr, HAS_REQUESTS)
    if row_tile * BLOCK_M >= num_rows * GROUP:
        return
    row_ids = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    real = row_ids < num_rows * GROUP
    tokens = (start + row_ids // GROUP).to(tl.int64)
    heads = kv_head * GROUP + row_ids % GROUP

    context = tl.load(context_lens_ptr + req)
    end = context + (tl.load(tail_lens_ptr + req) if HAS_TAIL_LENS else num_rows)
    oldest = tl.load(positions_ptr + tokens, mask=real, other=0).to(tl.int32)
    oldest += 1 - window  # the first position that the window leaves
    low, edge = context * 0, context * 0  # the first slots that any row, that every row sees
    if HAS_WINDOW:
        low = tl.min(tl.where(real, oldest, context), 0)
        low = tl.minimum(tl.maximum(low, 0), context)
        edge = tl.max(tl.where(real, oldest, 0), 0)
        edge = tl.minimum(tl.maximum(edge, low), context)
    num_tiles = tl.cdiv(end - low, BLOCK_N)
    num_edge = tl.cdiv(edge - low, BLOCK_N)
    num_full = tl.maximum((context - low) // BLOCK_N - num_edge, 0)
    num_masked = num_tiles - num_full
    # A share shorter than two times its rows would cost more in partial results than it saves.
    splits = tl.minimum(num_splits, tl.cdiv(num_tiles * BLOCK_N, 2 * BLOCK_M))
    begin = num_tiles * tl.minimum(split, splits) // tl.maximum(splits, 1)
    stop = num_tiles * tl.minimum(split + 1, splits) // tl.maximum(splits, 1)

    query_at = tokens * query_token_stride + heads * query_head_stride
    dtype: tl.constexpr = query_ptr.dtype.element_ty
    query = _load(query_ptr, query_at, real, query_dim_stride, dtype, 0, MAIN, MAIN)
    query_rest, acc_rest = query, tl.zeros([BLOCK_M, PADDED], tl.float32)
    if REST:
        query_rest = _load(query_ptr, query_at, real, query_dim_stride, dtype, MAIN, REST, PADDED)
    acc = tl.zeros([BLOCK_M, MAIN], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + heads, mask=real, other=float("-inf")).to(tl.float32)
        peak = tl.where(split == 0, sink * LOG2E, peak)
    norm = tl.where(peak == float("-inf"), 0.0, 1.0)
    score_scale = scale * (2 * LOG2E / soft_cap if HAS_CAP else LOG2E)
    if HAS_K_SCALE:
        score_scale *= tl.load(k_scale_ptr)

    key_ptr += kv_head * key_head_stride
    value_ptr += kv_head * value_head_stride
    block_table_ptr += req.to(tl.int64) * block_table_stride
    words_ptr = ancestor_mask_ptr + tokens * mask_row_stride
    if HAS_TAIL_POSITIONS:
        tail_positions_ptr += req.to(tl.int64) * tail_positions_stride
    else:
        tail_positions_ptr = positions_ptr + start
    for index in range(tl.maximum(begin, num_masked), stop):
        first = low + (index - num_masked + num_edge) * BLOCK_N
        acc, acc_rest, peak, norm = _attend(
            acc, acc_rest, peak, norm, query, query_rest, first, context, end,
            key_ptr, value_ptr, block_table_ptr, words_ptr, tail_positions_ptr, real, oldest,
            score_scale, soft_cap, word_stride, num_words,
            key_block_stride, key_slot_stride, key_dim_stride,
            value_block_stride, value_slot_stride, value_dim_stride,
            BLOCK_N, BLOCK_SIZE, MAIN, REST, PADDED, LATENT, HAS_CAP, HAS_WINDOW, False,
        )  # fmt: skip
    # Half tiles, for the registers that masking takes.
    num_halves = tl.cdiv(end - low, BLOCK_N // 2) - 2 * num_full
    num_halves = tl.minimum(2 * tl.minimum(stop, num_masked), num_halves)
    for half in tl.range(2 * begin, num_halves, num_stages=1):
        skipped = tl.where(half < 2 * num_edge, 0, num_full)
        first = low + skipped * BLOCK_N + half * (BLOCK_N // 2)
        acc, acc_rest, peak, norm = _attend(
            acc, acc_rest, peak, norm, query, query_rest, first, context, end,
            key_ptr, value_ptr, block_table_ptr, words_ptr, tail_positions_ptr, real, oldest,
            score_scale, soft_cap, word_stride, num_words,
            key_block_stride, key_slot_stride, key_dim_stride,
            value_block_stride, value_slot_stride, value_dim_stride,
            BLOCK_N // 2, BLOCK_SIZE, MAIN, REST, PADDED, LATENT, HAS_CAP, HAS_WINDOW, True,
        )  # fmt: skip

    seen = norm != 0.0
    norm = tl.where(seen, norm, 1.0)
    inverse = 1.0 / norm
    if HAS_V_SCALE:
        inverse *= tl.load(v_scale_ptr)
    VALUE: tl.constexpr = MAIN if LATENT else MAIN + REST
    if SPLIT:
        at = (tl.program_id(2) * tl.num_programs(1) + kv_head) * num_splits + split
        at = at * (num_row_tiles * BLOCK_M) + row_ids
        tl.store(lse_ptr + at, peak + tl.log2(norm), mask=real)
        ptr, at, dim_stride, written = partial_ptr, at * VALUE, 1, real & seen
    else:
        at = tokens * out_token_stride + heads * out_head_stride
        ptr, dim_stride, written = out_ptr, out_dim_stride, real
    _store(ptr, at, written, dim_stride, acc * inverse[:, None], 0, MAIN)
    if REST and not LATENT:
        _store(ptr, at, written, dim_stride, acc_rest * inverse[:, None], MAIN, REST)


@triton.jit
def _combine_kernel(
    out_ptr, partial_ptr, lse_ptr, query_start_loc_ptr, requests_ptr,
    num_splits, max_rows, out_token_stride, out_head_stride, out_dim_stride,
    GROUP: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, SPLITS: tl.constexpr, HAS_REQUESTS: tl.constexpr,
):  # fmt: skip
    """out = sum over splits of 2^lse * partial, over the sum of 2^lse; CHUNK splits at a time."""
    _, start, num_rows = _rows(query_start_loc_ptr, requests_ptr, HAS_REQUESTS)
    first = tl.program_id(0) * BLOCK_M
    if first >= num_rows * GROUP:
        return
    row_ids = first + tl.arange(0, BLOCK_M)
    real = row_ids < num_rows * GROUP
    kv_head = tl.program_id(1).to(tl.int64)
    base = (tl.program_id(2) * tl.num_programs(1) + kv_head) * num_splits * max_rows + row_ids

    every = tl.arange(0, SPLITS)
    mask = real[:, None] & (every < num_splits)[None, :]
    lse_ptrs = lse_ptr + base[:, None] + every[None, :] * max_rows
    every_lse = tl.load(lse_ptrs, mask=mask, other=float("-inf"))
    peak = tl.max(every_lse, 1)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    norm = tl.sum(tl.exp2(every_lse - peak[:, None]), 1)

    acc = tl.zeros([BLOCK_M, PADDED], tl.float32)
    dims = tl.arange(0, PADDED)
    for chunk in range(0, num_splits, CHUNK):
        splits = chunk + tl.arange(0, CHUNK)
        at = base[:, None] + splits[None, :] * max_rows
        held = real[:, None] & (splits < num_splits)[None, :]
        lse = tl.load(lse_ptr + at, mask=held, other=float("-inf"))
        written = (lse != float("-inf"))[:, :, None] & (dims < SIZE)[None, None, :]
        pointers = partial_ptr + at[:, :, None] * SIZE + dims[None, None, :]
        partial = tl.load(pointers, mask=written, other=0.0)
        acc += tl.sum(tl.exp2(lse - peak[:, None])[:, :, None] * partial, 1)
    acc = acc / tl.where(norm == 0.0, 1.0, norm)[:, None]
    out_at = (start + row_ids // GROUP).to(tl.int64) * out_token_stride
    out_at += (kv_head * GROUP + row_ids % GROUP) * out_head_stride
    _store(out_ptr, out_at, real, out_dim_stride, acc, 0, SIZE)


class _Tiles(NamedTuple):
    """BLOCK_M and BLOCK_N, warps and pipeline stages."""

    rows: int
    slots: int
    warps: int
    stages: int


def _tiles(num_rows: int, head_size: int, query: torch.Tensor, fp8: bool) -> _Tiles:
    """Chosen by arithmetic: the fewest row tiles whose kernel spills no register, not measured.

    A stage of K and V takes 16 to 64 KiB of shared memory; two of them are in flight. (The block
    table's load takes part in the pipeline, so that small tiles need five stages for that.) Slots
    are at least 32, as half a tile is the inner dimension of a tl.dot, which must be 16 or more.
    """
    wanted = max(16, triton.next_power_of_2(num_rows))
    if query.dtype == torch.float32:  # no tensor cores; above 192 dims it spills, and is not served
        return _Tiles(16, 32, 8, 2)
    if head_size > 256:  # latent; decoding fp8 takes registers
        if fp8:
            return _Tiles(16, 32, 8 if _has_wgmma(query.device) else 16, 5)
        return _Tiles(min(wanted, 32), 32, 8, 5)
    if head_size == 256:
        return _Tiles(min(wanted, 64), 32, 8, 5 if wanted <= 32 else 3)
    if head_size > 128:
        return _Tiles(min(wanted, 32), 32, 8, 5)
    if head_size != triton.next_power_of_2(head_size):
        return _Tiles(min(wanted, 64), 32, 8, 5)
    if wanted <= 32:
        return _Tiles(wanted, 64, 4, 5)
    if not _has_wgmma(query.device):
        return _Tiles(64, 64, 8, 3)
    return _Tiles(64, 64, 4, 3) if wanted == 64 else _Tiles(128, 64, 8, 3)


def _has_wgmma(device: torch.device) -> bool:
    """sm_90 and newer, where 128 rows do not spill. The interpreter has no GPU to ask."""
    return device.type == "cpu" or triton.runtime.driver.active.get_current_target().arch >= 90


@cache
def _num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return DEFAULT_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _num_splits(programs: int, max_slots: int, tiles: _Tiles, device: torch.device) -> int:
    """As many splits as fill the GPU, from sizes that do not change while a CUDA graph lives."""
    wanted = PROGRAMS_PER_SM * _num_sms(device) // max(programs, 1)
    return max(1, min(wanted, triton.cdiv(max_slots, max(tiles.slots, 2 * tiles.rows)), MAX_SPLITS))


def refuses(head_size: int, value_size: int) -> str | None:
    """What the kernel does not take of these sizes, None if it takes them."""
    if head_size < 16:
        return f"head_size {head_size} (below 16)"
    if head_size != value_size and value_size != triton.next_power_of_2(value_size):
        return f"a latent of {value_size} values (no power of two)"
    return None


def tree_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,  # LATENT, and so not read, where it is narrower than key_cache
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    context_lens: torch.Tensor,
    ancestor_mask: torch.Tensor,
    positions: torch.Tensor,
    *,
    scale: float,
    out: torch.Tensor,
    sliding_window: int | None,
    logits_soft_cap: float,
    max_query_len: int | None,
    **optional: torch.Tensor | None,  # the others of the op
) -> None:
    """As the reference; `refuses` said None."""
    _, block_size, num_kv_heads, head_size = key_cache.shape
    value_size, group = value_cache.shape[3], query.shape[1] // num_kv_heads
    latent = value_size != head_size
    main = value_size if latent else 1 << (head_size.bit_length() - 1)
    num_reqs = (context_lens if optional["requests"] is None else optional["requests"]).shape[0]
    max_rows = ancestor_mask.shape[1] * WORD_BITS if max_query_len is None else max_query_len
    max_rows = min(max_rows, query.shape[0]) * group
    tiles = _tiles(max_rows, head_size, query, fp8 := key_cache.dtype != query.dtype)
    row_tiles = triton.cdiv(max_rows, tiles.rows)
    programs, max_slots = row_tiles * num_kv_heads * num_reqs, block_table.shape[1] * block_size
    splits = _num_splits(programs, max_slots, tiles, query.device)
    max_rows = row_tiles * tiles.rows
    shape = (num_reqs, num_kv_heads, splits, max_rows) if splits > 1 else (0,)
    partial = query.new_empty((*shape, value_size), dtype=torch.float32)
    lse = query.new_empty(shape, dtype=torch.float32)
    if fp8:
        key_cache, value_cache = key_cache.view(torch.uint8), value_cache.view(torch.uint8)
    block_table, query_start_loc = _dense(block_table), _dense(query_start_loc)
    absent = query_start_loc  # a pointer that is not read
    tail_lens, tail_positions, requests, sinks, k_scale, v_scale = (
        absent if (tensor := optional[name]) is None else _dense(tensor) for name in OPTIONAL
    )
    flags = {f"HAS_{name.upper()}": optional[name] is not None for name in OPTIONAL}
    _tree_attention_kernel[(splits * row_tiles, num_kv_heads, num_reqs)](
        out, partial, lse, query, key_cache, value_cache, block_table, query_start_loc,
        _dense(context_lens), tail_lens, ancestor_mask, _dense(positions), tail_positions,
        requests, sinks, k_scale, v_scale,
        scale, logits_soft_cap, sliding_window or 0, ancestor_mask.shape[1], row_tiles, splits,
        *out.stride(), *query.stride(), *key_cache.stride(), *value_cache.stride(),
        block_table.stride(0), *ancestor_mask.stride(), tail_positions.stride(0),
        GROUP=group, BLOCK_SIZE=block_size, MAIN=main, REST=head_size - main,
        PADDED=_padded(head_size - main), LATENT=latent, BLOCK_M=tiles.rows, BLOCK_N=tiles.slots,
        SPLIT=splits > 1, HAS_CAP=logits_soft_cap != 0, HAS_WINDOW=sliding_window is not None,
        num_warps=tiles.warps, num_stages=tiles.stages, **flags,
    )  # fmt: skip
    if splits > 1:
        _combine(out, partial, lse, query_start_loc, requests, group, flags["HAS_REQUESTS"])


def _combine(
    out: torch.Tensor,
    partial: torch.Tensor,  # [num_reqs, num_kv_heads, splits, max_rows, value_size]
    lse: torch.Tensor,  # [num_reqs, num_kv_heads, splits, max_rows]
    query_start_loc: torch.Tensor,
    requests: torch.Tensor,
    group: int,
    has_requests: bool,
) -> None:
    num_reqs, num_kv_heads, splits, max_rows, value_size = partial.shape
    padded, all_splits = _padded(value_size), triton.next_power_of_2(splits)
    chunk = min(all_splits, COMBINE_TILE // padded)
    rows = COMBINE_TILE // (chunk * padded)
    _combine_kernel[(triton.cdiv(max_rows, rows), num_kv_heads, num_reqs)](
        out, partial, lse, query_start_loc, requests, splits, max_rows, *out.stride(),
        GROUP=group, SIZE=value_size, PADDED=padded, BLOCK_M=rows, CHUNK=chunk,
        SPLITS=all_splits, HAS_REQUESTS=has_requests, num_warps=4,
    )  # fmt: skip


def _padded(size: int) -> int:
    """The smallest power of two that holds `size` dims and that tl.dot takes."""
    return max(16, triton.next_power_of_2(size))


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself when its last dimension is dense."""
    return tensor if tensor.dim() == 0 or tensor.stride(-1) == 1 else tensor.contiguous()
