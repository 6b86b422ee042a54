"""tree_attention: the rows of token trees attend to a paged KV cache.

Request r has `context_lens[r]` committed slots and, after them, a tail: one slot per query row, or
`tail_lens[r]` of them, such as a tree whose deepest level are the rows. Row i sees all committed
slots and the tail slots (logical slot context_lens[r] + j) whose bit j is set in its ancestor
words, its own included:

    score[i, h, s] = softcap(scale * query[i, h] . key[s, h // group])
    out[i, h]      = sum_s softmax_s(score[i, h, :] over visible s, sinks[h]) * value[s, h // group]

with softcap(x) = cap * tanh(x / cap). A sliding window counts positions, not slots: the row at
position p sees positions above p - window. A committed slot's position is its index, a tail slot's
is `tail_positions[r, j]`, or that of row query_start_loc[r] + j. fp8 (e4m3) keys and values are
multiplied by `k_scale` and `v_scale`. A chain is a tree of width 1: its mask makes this causal
attention. The score matrix is never materialised (online softmax: Milakov and Gimelshein 2018,
arXiv 1805.02867); tree masks as in SpecInfer (Miao et al. 2024, arXiv 2305.09781).
"""

from __future__ import annotations

from typing import Any

import torch

from specplus_kernels import dispatch
from specplus_kernels.opaque import opaque
from specplus_kernels.tiled import is_tiled, plain_shape
from specplus_kernels.tree_attention import cpu, reference

__all__ = ["tree_attention"]


@opaque
def tree_attention(
    query: torch.Tensor,  # [num_tokens, num_heads, head_size] bf16, fp16 or fp32
    # [num_blocks, block_size, num_kv_heads, head_size] of any strides, or in tiles (tiled.py); as
    # query or float8_e4m3fn
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,  # as key_cache
    block_table: torch.Tensor,  # [num_reqs, max_blocks] int32
    query_start_loc: torch.Tensor,  # [num_reqs + 1] int32
    context_lens: torch.Tensor,  # [num_reqs] int32
    ancestor_mask: torch.Tensor,  # [num_tokens, words] int64, bit j = tail slot j is visible
    positions: torch.Tensor,  # [num_tokens] int64
    *,
    scale: float,
    out: torch.Tensor,  # [num_tokens, num_heads, head_size]
    sliding_window: int | None = None,  # tokens including the row itself; None or -1: no window
    logits_soft_cap: float = 0.0,  # 0: none
    sinks: torch.Tensor | None = None,  # [num_heads], one logit each without a value
    requests: torch.Tensor | None = None,  # [num] int32, the requests to compute; None: all
    tail_lens: torch.Tensor | None = None,  # [num_reqs] int32; None: the rows of each request
    tail_positions: torch.Tensor | None = None,  # [num_reqs, max_tail] int64; None: of the rows
    max_query_len: int | None = None,  # no request has more rows; None: what the words allow
    k_scale: torch.Tensor | None = None,  # one fp32, factor of the keys; None: 1
    v_scale: torch.Tensor | None = None,  # one fp32
) -> torch.Tensor:
    """Writes the attention of the rows of `requests` into `out`, leaves other rows, returns `out`.

    Masked and unused slots may hold anything, NaN included. A row that sees nothing gets zeros.

    Raises:
        ValueError: a shape or dtype does not fit, a request's tail is longer than its ancestor
            words have bits, or its slots reach past its block table. A GPU is not waited for, so
            there the last two are undefined behaviour.

    """
    _check(query, key_cache, value_cache, out, sinks)
    check_indices(block_table, query_start_loc, context_lens, ancestor_mask, positions, requests)
    window = sliding_window if sliding_window is not None and sliding_window > 0 else None
    check_tail(context_lens.shape[0], tail_lens, tail_positions, window)
    check_scales(k_scale, v_scale)
    tensors = {
        "query": query, "key_cache": key_cache, "value_cache": value_cache, "out": out,
        "block_table": block_table, "query_start_loc": query_start_loc, "positions": positions,
        "context_lens": context_lens, "ancestor_mask": ancestor_mask,
    }  # fmt: skip
    options = {
        "scale": scale, "sliding_window": window, "logits_soft_cap": logits_soft_cap,
        "sinks": sinks, "requests": requests,
    }  # fmt: skip
    extended = {
        "tail_lens": tail_lens, "tail_positions": tail_positions, "max_query_len": max_query_len,
        "k_scale": k_scale, "v_scale": v_scale,
    }  # fmt: skip
    _run(tensors, options, extended)
    return out


def _run(tensors: dict[str, Any], options: dict[str, Any], extended: dict[str, Any]) -> None:
    query, caches = tensors["query"], (tensors["key_cache"], tensors["value_cache"])
    which = dispatch.provider(query.device)
    if which == "triton":
        from specplus_kernels.tree_attention import kernel

        reason = kernel.refuses(query.shape[2], query.shape[2])
        if any(map(is_tiled, caches)):
            reason = "a KV cache in tiles"
        if reason is None:
            kernel.tree_attention(**tensors, **options, **extended)
            return
        which = dispatch.downgrade("tree_attention", reason)
    if which == "cpu":
        if (reason := cpu.refuses(query, *caches, tensors["out"], extended)) is None:
            cpu.tree_attention(**tensors, **options)
            return
        dispatch.downgrade("tree_attention", reason)
    reference.tree_attention(**tensors, **options, **extended)


def _check(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    out: torch.Tensor,
    sinks: torch.Tensor | None,
) -> None:
    shape, cache_shape, value_shape = query.shape, plain_shape(key_cache), plain_shape(value_cache)
    if value_shape != cache_shape or cache_shape[3] != shape[2]:
        raise ValueError(
            f"key_cache {cache_shape} and value_cache {value_shape} must both be "
            f"[num_blocks, block_size, num_kv_heads, {shape[2]}]"
        )
    if shape[1] % cache_shape[2]:
        raise ValueError(f"{shape[1]} query heads do not divide by {cache_shape[2]} KV heads")
    if out.shape != shape or out.dtype != query.dtype:
        raise ValueError(
            f"query {tuple(shape)} and out {tuple(out.shape)} must have one shape and one dtype, "
            f"got {query.dtype} and {out.dtype}"
        )
    if {key_cache.dtype, value_cache.dtype} not in ({query.dtype}, {torch.float8_e4m3fn}):
        raise ValueError(
            f"key_cache and value_cache must both be {query.dtype} like query, or float8_e4m3fn, "
            f"got {key_cache.dtype} and {value_cache.dtype}"
        )
    if sinks is not None and sinks.shape != (shape[1],):
        raise ValueError(f"sinks {tuple(sinks.shape)} must be [{shape[1]}]")


def check_indices(
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    context_lens: torch.Tensor,
    ancestor_mask: torch.Tensor,
    positions: torch.Tensor,
    requests: torch.Tensor | None,
) -> None:
    num_reqs, num_tokens = context_lens.shape[0], positions.shape[0]
    if block_table.shape[0] != num_reqs or query_start_loc.shape[0] != num_reqs + 1:
        raise ValueError(
            f"{num_reqs} context_lens need as many rows of block_table {tuple(block_table.shape)} "
            f"and one query_start_loc {tuple(query_start_loc.shape)} more"
        )
    if ancestor_mask.shape[0] != num_tokens:
        raise ValueError(
            f"{num_tokens} positions need as many rows of ancestor_mask, got "
            f"{tuple(ancestor_mask.shape)}"
        )
    narrow = {block_table.dtype, query_start_loc.dtype, context_lens.dtype}
    if requests is not None:
        narrow.add(requests.dtype)
    if narrow != {torch.int32}:
        raise ValueError(
            "block_table, query_start_loc, context_lens and requests must be int32, got "
            f"{sorted(map(str, narrow))}"
        )
    if not ancestor_mask.dtype == positions.dtype == torch.int64:
        raise ValueError(
            "ancestor_mask and positions must be int64, got "
            f"{ancestor_mask.dtype} and {positions.dtype}"
        )


def check_tail(
    num_reqs: int,
    tail_lens: torch.Tensor | None,
    tail_positions: torch.Tensor | None,
    window: int | None,
) -> None:
    if tail_lens is not None and (tail_lens.shape, tail_lens.dtype) != ((num_reqs,), torch.int32):
        raise ValueError(
            f"tail_lens must be [{num_reqs}] int32, got {tuple(tail_lens.shape)} {tail_lens.dtype}"
        )
    if tail_positions is None:
        if tail_lens is not None and window is not None:
            raise ValueError("tail_lens with a sliding_window need tail_positions, got None")
    elif tail_positions.shape[0] != num_reqs or tail_positions.dtype != torch.int64:
        raise ValueError(
            f"tail_positions must be [{num_reqs}, max_tail] int64, got "
            f"{tuple(tail_positions.shape)} {tail_positions.dtype}"
        )


def check_scales(*scales: torch.Tensor | None) -> None:
    for scale in scales:
        if scale is not None and (scale.numel() != 1 or scale.dtype != torch.float32):
            raise ValueError(
                f"k_scale and v_scale must be one fp32 each, got {tuple(scale.shape)} {scale.dtype}"
            )
