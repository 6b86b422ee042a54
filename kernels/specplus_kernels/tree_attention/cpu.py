"""Launcher of cpu.cpp: vLLM's "vec" and "amx" KV layouts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from specplus_kernels.cpu_library import DTYPES, Kernel
from specplus_kernels.tiled import is_tiled, plain_shape

_kernel = Kernel("specplus_tree_attention", "30q2d")
_ERRORS = {
    1: "request {} has more rows than its ancestor words have bits, or than 128",
    2: "request {} reads slots past its block table, or a block that is not in the cache",
}
_REFUSED = ("tail_lens", "tail_positions", "k_scale", "v_scale")
_VECTOR = 16  # floats of the widest vector that the kernel may be compiled for
_SIDE = 16  # slots or dimensions of an AMX tile, in pairs of the other


def refuses(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    out: torch.Tensor,
    extended: Mapping[str, Any],
) -> str | None:
    """What the kernel does not take of these arguments, None if it takes them."""
    refused = [name for name in _REFUSED if extended[name] is not None]
    if refused:
        return ", ".join(refused)
    _, block_size, _, head_size = plain_shape(key_cache)
    if query.dtype not in DTYPES or key_cache.dtype != query.dtype:
        return f"{query.dtype} queries on a {key_cache.dtype} cache"
    if head_size % _VECTOR or block_size % _VECTOR:
        return f"head_size {head_size} with block_size {block_size} (multiples of {_VECTOR})"
    if not (_is_vec(key_cache, value_cache) or _is_amx(key_cache, value_cache)):
        return "a KV cache that is not of the vec layout, or in bf16 of the amx layout"
    if query.stride(2) != 1 or out.stride(2) != 1:
        return "a query or out that is not contiguous in head_size"
    return None


def _is_vec(key_cache: torch.Tensor, value_cache: torch.Tensor) -> bool:
    if key_cache.dim() != 4:
        return False
    _, block_size, num_kv_heads, head_size = key_cache.shape
    block, slot, head, dim = key_cache.stride()
    if num_kv_heads == 1:  # torch leaves the stride of a dimension of size 1 undefined
        head = value_cache.stride(2)
    values = (block, head_size, head, 1)
    return (slot, dim) == (1, block_size) and value_cache.stride() == values


def _is_amx(key_cache: torch.Tensor, value_cache: torch.Tensor) -> bool:
    shapes = key_cache.shape[2::3], value_cache.shape[2::3]
    if shapes != ((_SIDE, 2), (2, _SIDE)) or key_cache.dtype != torch.bfloat16:
        return False
    _, block_size, num_kv_heads, head_size = plain_shape(key_cache)
    block, head = key_cache.stride(0), key_cache.stride(3)
    if num_kv_heads == 1:
        head = value_cache.stride(3)
    keys = (block, _SIDE * head_size, 2, 2 * _SIDE, 1)
    values = (block, 2 * _SIDE, 1, head, _SIDE * block_size, 2)
    strides = key_cache.stride()
    return (*strides[:3], *strides[4:]) == keys and value_cache.stride() == values


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
) -> None:
    """As the reference; `refuses` said None."""
    num_blocks, block_size, num_kv_heads, head_size = plain_shape(key_cache)
    if block_table.stride(1) != 1 or ancestor_mask.stride(1) != 1:
        block_table, ancestor_mask = block_table.contiguous(), ancestor_mask.contiguous()
    query_start_loc, context_lens = query_start_loc.contiguous(), context_lens.contiguous()
    positions = positions.contiguous()
    requests = requests if requests is None else requests.contiguous()
    sinks = sinks if sinks is None else sinks.float().contiguous()
    result = _kernel(
        query.data_ptr(),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        out.data_ptr(),
        block_table.data_ptr(),
        query_start_loc.data_ptr(),
        context_lens.data_ptr(),
        ancestor_mask.data_ptr(),
        positions.data_ptr(),
        *(0 if each is None else each.data_ptr() for each in (requests, sinks)),
        DTYPES[query.dtype],
        len(context_lens) if requests is None else len(requests),
        query.shape[1],
        num_kv_heads,
        head_size,
        block_size,
        num_blocks,
        block_table.shape[1],
        ancestor_mask.shape[1],
        sliding_window or 0,
        is_tiled(key_cache),
        query.stride(0),
        query.stride(1),
        out.stride(0),
        out.stride(1),
        block_table.stride(0),
        ancestor_mask.stride(0),
        key_cache.stride(0),
        key_cache.stride(3 if is_tiled(key_cache) else 2),
        scale,
        logits_soft_cap,
    )
    if result:
        raise ValueError(_ERRORS[result >> 32].format(result & 0xFFFFFFFF))
