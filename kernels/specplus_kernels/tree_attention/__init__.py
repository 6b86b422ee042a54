"""tree_attention: the rows of token trees attend to a paged KV cache.

Request r has `context_lens[r]` committed slots and, after them, one tail slot per query row: tail
slot j (logical slot context_lens[r] + j) was written by row query_start_loc[r] + j. Row i sees all
committed slots and the tail slots whose bit is set in its ancestor words, itself included:

    score[i, h, s] = softcap(scale * query[i, h] . key[s, h // group])
    out[i, h]      = sum_s softmax_s(score[i, h, :] over visible s, sinks[h]) * value[s, h // group]

with softcap(x) = cap * tanh(x / cap). A sliding window counts positions, not slots: the row at
position p sees positions above p - window. A committed slot's position is its index, a tail slot's
that of its row. A chain is a tree of width 1: its mask makes this causal attention. The score
matrix is never materialised (online softmax: Milakov and Gimelshein 2018, arXiv 1805.02867); tree
masks as in SpecInfer (Miao et al. 2024, arXiv 2305.09781).
"""

from __future__ import annotations

import torch

from specplus_kernels import dispatch
from specplus_kernels.tree_attention import cpu, reference

__all__ = ["tree_attention"]


def tree_attention(
    query: torch.Tensor,  # [num_tokens, num_heads, head_size] bf16, fp16 or fp32
    key_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_size], any strides
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
) -> torch.Tensor:
    """Writes the attention of the rows of `requests` into `out`, leaves other rows, returns `out`.

    Masked and unused slots may hold anything, NaN included. A row that sees nothing gets zeros.

    Raises:
        ValueError: a shape or dtype does not fit, a request has more rows than its ancestor words
            have bits, or its slots reach past its block table.

    """
    _check(query, key_cache, value_cache, out, sinks)
    _check_indices(block_table, query_start_loc, context_lens, ancestor_mask, positions, requests)
    which = dispatch.provider(query.device)
    if which == "cpu" and (reason := cpu.refuses(query, key_cache, value_cache, out)):
        which = dispatch.downgrade("tree_attention", reason)
    run = cpu.tree_attention if which == "cpu" else reference.tree_attention
    window = sliding_window if sliding_window is not None and sliding_window > 0 else None
    run(
        query,
        key_cache,
        value_cache,
        block_table,
        query_start_loc,
        context_lens,
        ancestor_mask,
        positions,
        scale=scale,
        out=out,
        sliding_window=window,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        requests=requests,
    )
    return out


def _check(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    out: torch.Tensor,
    sinks: torch.Tensor | None,
) -> None:
    shape, cache_shape = query.shape, key_cache.shape
    if value_cache.shape != cache_shape or cache_shape[3] != shape[2]:
        raise ValueError(
            f"key_cache {tuple(cache_shape)} and value_cache {tuple(value_cache.shape)} must both "
            f"be [num_blocks, block_size, num_kv_heads, {shape[2]}]"
        )
    if shape[1] % cache_shape[2]:
        raise ValueError(f"{shape[1]} query heads do not divide by {cache_shape[2]} KV heads")
    if out.shape != shape or not out.dtype == key_cache.dtype == value_cache.dtype == query.dtype:
        raise ValueError(
            f"query {tuple(shape)} and out {tuple(out.shape)} must have one shape and, with the "
            f"caches, one dtype, got {query.dtype}, {out.dtype}, {key_cache.dtype}, "
            f"{value_cache.dtype}"
        )
    if sinks is not None and sinks.shape != (shape[1],):
        raise ValueError(f"sinks {tuple(sinks.shape)} must be [{shape[1]}]")


def _check_indices(
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
