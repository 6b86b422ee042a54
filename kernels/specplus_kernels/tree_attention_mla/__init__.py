"""tree_attention_mla: tree attention over a latent cache (DeepSeek-V2, 2024, arXiv 2405.04434).

A slot holds one vector for all heads: `kv_lora_rank` latent dims and, after them, the rotated part
of its key. With the up-projections absorbed into the query and the output, the whole vector is the
key of every head and its latent part the value:

    score[i, h, s] = scale * query[i, h] . latent[s]
    out[i, h]      = sum_s softmax_s(score[i, h, :] over visible s) * latent[s, :kv_lora_rank]

Which slots row i sees, the tail, the fp8 scale (one, as keys and values are the same memory) and
`requests` are as in tree_attention. Its reference and its kernel run here too, with one KV head
whose values lie inside its keys: the kernel loads each latent once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from specplus_kernels import dispatch
from specplus_kernels.opaque import opaque
from specplus_kernels.tree_attention import check_indices, check_scales, check_tail, reference

__all__ = ["tree_attention_mla"]


@opaque
def tree_attention_mla(
    query: torch.Tensor,  # [num_tokens, num_heads, kv_lora_rank + rope_size] bf16, fp16 or fp32
    # [num_blocks, block_size, kv_lora_rank + rope_size], any strides, as query or float8_e4m3fn
    latent_cache: torch.Tensor,
    block_table: torch.Tensor,  # [num_reqs, max_blocks] int32
    query_start_loc: torch.Tensor,  # [num_reqs + 1] int32
    context_lens: torch.Tensor,  # [num_reqs] int32
    ancestor_mask: torch.Tensor,  # [num_tokens, words] int64, bit j = tail slot j is visible
    positions: torch.Tensor,  # [num_tokens] int64
    *,
    scale: float,
    out: torch.Tensor,  # [num_tokens, num_heads, kv_lora_rank]
    sliding_window: int | None = None,  # tokens including the row itself; None or -1: no window
    requests: torch.Tensor | None = None,  # [num] int32, the requests to compute; None: all
    tail_lens: torch.Tensor | None = None,  # [num_reqs] int32; None: the rows of each request
    tail_positions: torch.Tensor | None = None,  # [num_reqs, max_tail] int64; None: of the rows
    max_query_len: int | None = None,  # no request has more rows; None: what the words allow
    kv_scale: torch.Tensor | None = None,  # one fp32, factor of the latents; None: 1
) -> torch.Tensor:
    """Writes the attention of the rows of `requests` into `out`, leaves other rows, returns `out`.

    Masked and unused slots may hold anything, NaN included. A row that sees nothing gets zeros.

    Raises:
        ValueError: as tree_attention.

    """
    _check(query, latent_cache, out)
    check_indices(block_table, query_start_loc, context_lens, ancestor_mask, positions, requests)
    window = sliding_window if sliding_window is not None and sliding_window > 0 else None
    check_tail(context_lens.shape[0], tail_lens, tail_positions, window)
    check_scales(kv_scale)
    run: Callable[..., None] = reference.tree_attention
    if dispatch.provider(query.device) == "triton":
        from specplus_kernels.tree_attention import kernel

        if reason := kernel.refuses(query.shape[2], out.shape[2]):
            dispatch.downgrade("tree_attention_mla", reason)
        else:
            run = kernel.tree_attention
    keys = latent_cache[:, :, None]
    run(
        query, keys, keys[..., : out.shape[2]], block_table, query_start_loc, context_lens,
        ancestor_mask, positions, scale=scale, out=out, sliding_window=window,
        logits_soft_cap=0.0, sinks=None, requests=requests, tail_lens=tail_lens,
        tail_positions=tail_positions, max_query_len=max_query_len,
        k_scale=kv_scale, v_scale=kv_scale,
    )  # fmt: skip
    return out


def _check(query: torch.Tensor, latent_cache: torch.Tensor, out: torch.Tensor) -> None:
    if latent_cache.dim() != 3 or latent_cache.shape[2] != query.shape[2]:
        raise ValueError(
            f"latent_cache {tuple(latent_cache.shape)} must be [num_blocks, block_size, "
            f"{query.shape[2]}], as wide as query"
        )
    if latent_cache.dtype not in (query.dtype, torch.float8_e4m3fn):
        raise ValueError(
            f"latent_cache must be {query.dtype} like query, or float8_e4m3fn, got "
            f"{latent_cache.dtype}"
        )
    narrower = out.dim() == 3 and 0 < out.shape[2] < query.shape[2]
    if not narrower or out.shape[:2] != query.shape[:2] or out.dtype != query.dtype:
        raise ValueError(
            f"out must be [{query.shape[0]}, {query.shape[1]}, kv_lora_rank below "
            f"{query.shape[2]}] {query.dtype}, got {tuple(out.shape)} {out.dtype}"
        )
