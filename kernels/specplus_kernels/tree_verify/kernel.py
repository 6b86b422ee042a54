"""tree_verify in Triton: one pass over the logits, then one program a request."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from specplus_kernels.sampling import kernel as sampling
from specplus_kernels.sampling import trees
from specplus_kernels.sampling.kernel import hash_prefix, noised_argmax
from specplus_kernels.sampling.trees import Batch, Verified


def tree_verify(logits: torch.Tensor, batch: Batch) -> tuple[Verified, torch.Tensor]:
    """See the package's docstring."""
    num_rows, vocab_size = logits.shape
    splits = sampling.num_splits(num_rows, vocab_size)
    best = torch.empty(num_rows, splits, device=logits.device)
    best_token = torch.empty(num_rows, splits, dtype=torch.int32, device=logits.device)
    has_nan = torch.empty_like(best_token)
    result = trees.empty_result(batch)
    target_tokens = torch.full_like(batch.draft_tokens, -1)
    _target_token_kernel[(num_rows, splits)](
        best,
        best_token,
        has_nan,
        logits,
        logits.stride(0),
        batch.cu_num_rows,
        batch.temperature,
        batch.seeds,
        batch.positions,
        batch.num_reqs,
        vocab_size,
        sampling.split_size(vocab_size, splits),
        BLOCK=sampling.BLOCK,
        num_warps=sampling.NUM_WARPS,
    )
    _match_kernel[(batch.num_reqs,)](
        result.tokens,
        result.path,
        result.num_emitted,
        target_tokens,
        best,
        best_token,
        has_nan,
        batch.draft_tokens,
        batch.draft_tokens if batch.parents is None else batch.parents,
        batch.cu_num_rows,
        batch.max_path,
        IS_CHAIN=batch.parents is None,
        SPLITS=splits,
        ROWS=triton.next_power_of_2(batch.max_rows),
        PATH=triton.next_power_of_2(batch.max_path + 1),
        num_warps=4,
    )
    return result, target_tokens


@triton.jit
def _target_token_kernel(
    best_ptr,  # [num_rows, splits] fp32
    best_token_ptr,  # [num_rows, splits] int32
    has_nan_ptr,  # [num_rows, splits] int32
    logits_ptr,
    logits_stride,
    cu_num_rows_ptr,
    temperature_ptr,
    seeds_ptr,
    positions_ptr,
    num_reqs,
    vocab_size,
    split_size,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if row >= tl.load(cu_num_rows_ptr + num_reqs):
        return
    temperature = tl.load(temperature_ptr + row)
    prefix = hash_prefix(tl.load(seeds_ptr + row), tl.load(positions_ptr + row), 0)
    start = tl.program_id(1) * split_size
    best = tl.full((), float("-inf"), tl.float32)
    best_token = tl.full((), 0, tl.int32)
    nans = tl.zeros((BLOCK,), tl.int32)
    for block in range(start, tl.minimum(start + split_size, vocab_size), BLOCK):
        tokens = block + tl.arange(0, BLOCK)
        scores = tl.load(
            logits_ptr + row * logits_stride + tokens,
            mask=tokens < vocab_size,
            other=float("-inf"),
        ).to(tl.float32)
        nans |= (scores != scores).to(tl.int32)
        scores = tl.where(scores == scores, scores, float("-inf"))
        best, best_token = noised_argmax(best, best_token, scores, tokens, prefix, temperature)
    out = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(best_ptr + out, best)
    tl.store(best_token_ptr + out, best_token)
    tl.store(has_nan_ptr + out, tl.max(nans, 0))


@triton.jit
def _match_kernel(
    tokens_ptr,  # [num_reqs, max_path + 1]
    path_ptr,  # [num_reqs, max_path + 1]
    num_emitted_ptr,
    target_tokens_ptr,
    best_ptr,
    best_token_ptr,
    has_nan_ptr,
    draft_tokens_ptr,
    parents_ptr,
    cu_num_rows_ptr,
    max_path,
    IS_CHAIN: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    PATH: tl.constexpr,
):
    req = tl.program_id(0).to(tl.int64)
    start = tl.load(cu_num_rows_ptr + req).to(tl.int64)
    num_rows = tl.load(cu_num_rows_ptr + req + 1) - start.to(tl.int32)
    row = tl.arange(0, ROWS)
    is_row = row < num_rows

    part = (start + row)[:, None] * SPLITS + tl.arange(0, SPLITS)[None, :]
    best = tl.load(best_ptr + part, mask=is_row[:, None], other=float("-inf"))
    token = tl.load(best_token_ptr + part, mask=is_row[:, None], other=0)
    nans = tl.load(has_nan_ptr + part, mask=is_row[:, None], other=0)
    is_top = (best == tl.max(best, 1)[:, None]) & (best > float("-inf"))
    target = tl.min(tl.where(is_top, token, 0x7FFFFFFF), 1)
    target = tl.where(target == 0x7FFFFFFF, 0, target)
    has_nan = tl.max(nans, 1)
    tl.store(target_tokens_ptr + start + row, target.to(tl.int64), mask=is_row)

    draft = tl.load(draft_tokens_ptr + start + row, mask=is_row, other=-1)
    if IS_CHAIN:
        parent = row - 1
    else:
        parent = tl.load(parents_ptr + start + row, mask=is_row, other=-1).to(tl.int32)
    step = tl.arange(0, PATH)
    path = tl.full((PATH,), -1, tl.int32)
    emitted = tl.full((PATH,), -1, tl.int32)
    node = tl.where(num_rows > 0, 0, ROWS)
    count = 0
    for depth in range(max_path + 1):
        if node < ROWS:
            wanted = tl.sum(tl.where(row == node, target, 0), 0)
            blocked = tl.sum(tl.where(row == node, has_nan, 0), 0) > 0
            path = tl.where(step == depth, node, path)
            emitted = tl.where(step == depth, wanted, emitted)
            count += 1
            match = is_row & (row > 0) & (parent == node) & (draft == wanted)
            node = tl.where(blocked, ROWS, tl.min(tl.where(match, row, ROWS), 0))
    out = req * (max_path + 1) + step
    tl.store(tokens_ptr + out, emitted.to(tl.int64), mask=step <= max_path)
    tl.store(path_ptr + out, path.to(tl.int64), mask=step <= max_path)
    tl.store(num_emitted_ptr + req, count)
