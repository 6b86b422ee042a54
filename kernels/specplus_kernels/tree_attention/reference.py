"""tree_attention in plain torch, fp32, request by request."""

from __future__ import annotations

import torch

from specplus_kernels.tiled import plain

WORD_BITS = 64


def tree_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
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
    sinks: torch.Tensor | None,
    requests: torch.Tensor | None,
    tail_lens: torch.Tensor | None = None,
    tail_positions: torch.Tensor | None = None,
    max_query_len: int | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """See the package's docstring; `sliding_window` is None or positive."""
    key_cache, value_cache = plain(key_cache), plain(value_cache)
    starts, contexts = query_start_loc.tolist(), context_lens.tolist()
    tails = query_start_loc.diff().tolist() if tail_lens is None else tail_lens.tolist()
    chosen = range(len(contexts)) if requests is None else requests.tolist()
    for req in chosen:
        rows, num_slots = slice(starts[req], starts[req + 1]), contexts[req] + tails[req]
        _check_request(req, tails[req], num_slots, key_cache, block_table, ancestor_mask)
        visible = _visible(ancestor_mask[rows], tails[req], contexts[req])
        if sliding_window is not None:
            committed = torch.arange(contexts[req], device=positions.device)
            of_tail = positions[rows] if tail_positions is None else tail_positions[req]
            slot_positions = torch.cat([committed, of_tail[: tails[req]]])
            visible &= slot_positions[None, :] > positions[rows, None] - sliding_window
        keys = _gather(key_cache, block_table[req], num_slots, k_scale)
        values = _gather(value_cache, block_table[req], num_slots, v_scale)
        attended = _attend(query[rows], keys, values, visible, scale, logits_soft_cap, sinks)
        out[rows] = attended.to(out.dtype)


def _check_request(
    req: int,
    tail_len: int,
    num_slots: int,
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    ancestor_mask: torch.Tensor,
) -> None:
    bits = ancestor_mask.shape[1] * WORD_BITS
    if tail_len > bits:
        raise ValueError(f"request {req} has {tail_len} rows, its ancestor words {bits} bits")
    if num_slots > block_table.shape[1] * key_cache.shape[1]:
        raise ValueError(f"request {req} reads {num_slots} slots, more than its block table has")


def _visible(
    words: torch.Tensor,  # [num_rows, words] int64
    tail_len: int,
    context_len: int,
) -> torch.Tensor:  # [num_rows, context_len + tail_len] bool
    bit = torch.arange(tail_len, device=words.device)
    tail = (words[:, bit // WORD_BITS] >> (bit % WORD_BITS)) & 1
    return torch.nn.functional.pad(tail.bool(), (context_len, 0), value=True)


def _gather(
    cache: torch.Tensor, blocks: torch.Tensor, num_slots: int, scale: torch.Tensor | None
) -> torch.Tensor:
    """The first `num_slots` slots of one request, [num_kv_heads, num_slots, head_size] fp32.

    Copies along the dimension that is contiguous in memory: the slots in vLLM's CPU keys, else
    the head.
    """
    picked = blocks[: -(-num_slots // cache.shape[1])].long()
    if cache.stride(1) == 1:
        gathered = cache.permute(0, 2, 3, 1)[picked].permute(1, 2, 0, 3).flatten(2).mT
    else:
        gathered = cache.transpose(1, 2)[picked].transpose(0, 1).flatten(1, 2)
    gathered = gathered[:, :num_slots].float()
    return gathered if scale is None else gathered * scale


def _attend(
    query: torch.Tensor,  # [num_rows, num_heads, head_size]
    keys: torch.Tensor,  # [num_kv_heads, num_slots, head_size] fp32
    values: torch.Tensor,  # [num_kv_heads, num_slots, value_size] fp32
    visible: torch.Tensor,  # [num_rows, num_slots] bool
    scale: float,
    logits_soft_cap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:  # [num_rows, num_heads, value_size] fp32
    num_rows, num_heads, head_size = query.shape
    num_kv_heads, group = len(keys), num_heads // len(keys)
    shape = (num_kv_heads, group, num_rows, visible.shape[1])
    grouped = query.float().view(num_rows, num_kv_heads, group, head_size).permute(1, 2, 0, 3)
    grouped = grouped.reshape(num_kv_heads, group * num_rows, head_size)
    scores = torch.bmm(grouped, keys.mT).view(shape) * scale
    if logits_soft_cap:
        scores = logits_soft_cap * torch.tanh(scores / logits_soft_cap)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        sink = sinks.float().view(num_kv_heads, group, 1, 1).expand(*shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : shape[3]].masked_fill(~visible, 0.0)
    attended = _mix(weights, values, visible)
    return attended.permute(2, 0, 1, 3).reshape(num_rows, num_heads, values.shape[2])


def _mix(
    weights: torch.Tensor,  # [num_kv_heads, group, num_rows, num_slots], 0 where masked
    values: torch.Tensor,  # [num_kv_heads, num_slots, value_size], a copy of the cache
    visible: torch.Tensor,
) -> torch.Tensor:  # [num_kv_heads, group, num_rows, value_size]
    flat, shape = weights.flatten(1, 2), (*weights.shape[:3], values.shape[2])
    values.masked_fill_(~visible.any(0)[:, None], 0.0)
    mixed = torch.bmm(flat, values).view(shape)
    if mixed.isfinite().all():
        return mixed
    # A value that some rows see is not finite: the others saw it as 0 * NaN.
    mixed = torch.bmm(flat, values.nan_to_num(0.0, 0.0, 0.0)).view(shape)
    touched = torch.matmul(visible.float(), (~values.isfinite()).float()) > 0
    return mixed.masked_fill(touched[:, None], torch.nan)
