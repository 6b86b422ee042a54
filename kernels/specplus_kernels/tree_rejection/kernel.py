"""tree_rejection in Triton: six launches with fixed grids; a chain is a tree without `parents`.

links     (num_reqs)          first child, next sibling, coins of all nodes
stats     (num_rows, splits)  max and sum of exponentials of the rows with children, p and q
nodes     (num_rows)          p and q at every node's token
walk      (num_reqs)          the path, by the rule
residual  (num_reqs, splits)  Gumbel-max over the residual of the path's last row
bonus     (num_reqs)          combines the splits
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from specplus_kernels.sampling import kernel as sampling
from specplus_kernels.sampling import trees
from specplus_kernels.sampling.kernel import clean, hash_prefix, noised_argmax
from specplus_kernels.sampling.trees import Batch, Verified
from specplus_kernels.tree_rejection.rows_kernel import (
    DRAFT_INV,
    DRAFT_MAX,
    FIRST_CHILD,
    NEXT_SIBLING,
    TARGET_INV,
    TARGET_MAX,
    _links_kernel,
    _nodes_kernel,
    _stats_kernel,
)
from specplus_kernels.tree_rejection.walk_kernel import STATE, TINY, _walk_kernel

RULES = {"recursive": 0, "traversal": 1, "typical": 2}

# The walk's pass over a row runs on one SM: chosen by arithmetic, 8 warps x 16 elements a thread of
# p and of q keep 16 KiB (bf16) in flight, about 20 us for 152k tokens.
PASS_BLOCK, PASS_WARPS = 4096, 8
LINK_COLUMNS = 8  # nodes compared with 128 rows at a time; 16 need a stack under Triton 3.6


@dataclass(frozen=True, slots=True)
class _Scratch:
    """What the kernels hand on; the fields of each array are numbered in rows_kernel.py."""

    links: torch.Tensor  # [fields, num_rows] int32
    numbers: torch.Tensor  # [fields, num_rows] fp32
    last: torch.Tensor  # [2, num_reqs] int32: the path's last row, its rejected children
    last_numbers: torch.Tensor  # [2, num_reqs] fp32: its weight and what was taken of it


def tree_rejection(
    rule: str,
    logits: torch.Tensor,
    draft_logits: torch.Tensor | None,
    batch: Batch,
    epsilon: float,
    delta: float,
) -> Verified:
    """See the package's docstring."""
    num_rows, device = len(logits), logits.device
    scratch = _Scratch(
        torch.empty(5, num_rows, dtype=torch.int32, device=device),
        torch.empty(7, num_rows, device=device),
        torch.empty(2, batch.num_reqs, dtype=torch.int32, device=device),
        torch.empty(2, batch.num_reqs, device=device),
    )
    has_draft = draft_logits is not None and rule != "typical"
    draft = logits if draft_logits is None else draft_logits
    rows = (logits, logits.stride(0), draft, draft.stride(0))
    result = trees.empty_result(batch)
    _link(scratch, batch, logits.shape[1], has_draft)
    _weigh_nodes(scratch, batch, rows, has_draft, rule == "typical", epsilon, delta)
    _walk_kernel[(batch.num_reqs,)](
        *result,
        scratch.last,
        scratch.last_numbers,
        torch.empty(num_rows, STATE.value, device=device),
        scratch.links,
        scratch.numbers,
        *rows,
        batch.draft_tokens,
        batch.cu_num_rows,
        batch.num_reqs,
        num_rows,
        logits.shape[1],
        batch.max_path,
        RULE=RULES[rule],
        HAS_DRAFT=has_draft,
        PATH=triton.next_power_of_2(batch.max_path + 1),
        BLOCK=PASS_BLOCK,
        num_warps=PASS_WARPS if has_draft else 1,
    )
    _draw_bonus(result, scratch, batch, rows, has_draft)
    return result


Rows = tuple[torch.Tensor, int, torch.Tensor, int]  # logits and draft logits with their strides


def _link(scratch: _Scratch, batch: Batch, vocab_size: int, has_draft: bool) -> None:
    tokens = batch.draft_tokens
    _links_kernel[(batch.num_reqs,)](
        scratch.links,
        scratch.numbers,
        tokens,
        tokens if batch.parents is None else batch.parents,
        tokens if batch.is_sampled is None else batch.is_sampled.view(torch.uint8),
        batch.cu_num_rows,
        batch.temperature,
        batch.seeds,
        batch.positions,
        len(tokens),
        vocab_size,
        IS_CHAIN=batch.parents is None,
        HAS_DRAFT=has_draft,
        HAS_KINDS=batch.is_sampled is not None,
        ROWS=max(triton.next_power_of_2(batch.max_rows), LINK_COLUMNS),
        COLUMNS=LINK_COLUMNS,
        num_warps=4,
    )


def _weigh_nodes(
    scratch: _Scratch,
    batch: Batch,
    rows: Rows,
    has_draft: bool,
    is_typical: bool,
    epsilon: float,
    delta: float,
) -> None:
    num_rows, vocab_size = rows[0].shape
    splits = sampling.num_splits(num_rows, vocab_size)
    parts = torch.empty(5, num_rows, splits, device=rows[0].device)
    part_token = torch.empty(num_rows, splits, dtype=torch.int32, device=rows[0].device)
    _stats_kernel[(num_rows, splits)](
        parts,
        part_token,
        scratch.links,
        *rows,
        batch.cu_num_rows,
        batch.temperature,
        batch.num_reqs,
        num_rows,
        vocab_size,
        sampling.split_size(vocab_size, splits),
        HAS_DRAFT=has_draft,
        ENTROPY=is_typical,
        BLOCK=sampling.BLOCK,
        num_warps=sampling.NUM_WARPS,
    )
    _nodes_kernel[(num_rows,)](
        scratch.numbers,
        scratch.links,
        parts,
        part_token,
        *rows,
        batch.draft_tokens,
        batch.cu_num_rows,
        batch.temperature,
        batch.num_reqs,
        num_rows,
        vocab_size,
        epsilon,
        delta,
        HAS_DRAFT=has_draft,
        TYPICAL_RULE=is_typical,
        SPLITS=splits,
        num_warps=1,
    )


def _draw_bonus(
    result: Verified, scratch: _Scratch, batch: Batch, rows: Rows, has_draft: bool
) -> None:
    num_rows, vocab_size = rows[0].shape
    splits = sampling.num_splits(batch.num_reqs, vocab_size)
    best = torch.empty(batch.num_reqs, splits, device=rows[0].device)
    best_token = torch.empty(batch.num_reqs, splits, dtype=torch.int32, device=rows[0].device)
    _residual_kernel[(batch.num_reqs, splits)](
        best,
        best_token,
        scratch.last,
        scratch.last_numbers,
        scratch.links,
        scratch.numbers,
        *rows,
        batch.draft_tokens,
        batch.temperature,
        batch.seeds,
        batch.positions,
        batch.num_reqs,
        num_rows,
        vocab_size,
        sampling.split_size(vocab_size, splits),
        HAS_DRAFT=has_draft,
        BLOCK=sampling.BLOCK,
        num_warps=sampling.NUM_WARPS,
    )
    _bonus_kernel[(batch.num_reqs,)](
        result.tokens,
        result.num_emitted,
        best,
        best_token,
        batch.max_path,
        SPLITS=splits,
        num_warps=1,
    )


@triton.jit
def _residual_kernel(
    best_ptr,
    best_token_ptr,
    last_ptr,
    last_numbers_ptr,
    links_ptr,
    numbers_ptr,
    logits_ptr,
    logits_stride,
    draft_logits_ptr,
    draft_logits_stride,
    draft_tokens_ptr,
    temperature_ptr,
    seeds_ptr,
    positions_ptr,
    num_reqs,
    num_rows,
    vocab_size,
    split_size,
    HAS_DRAFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """log m(x) + noise = logits + log(1 - taken q / (weight p)) + noise, up to a constant."""
    req = tl.program_id(0)
    row = tl.load(last_ptr + req).to(tl.int64)
    if row < 0:
        return
    elders = tl.load(last_ptr + num_reqs + req)
    weight = tl.load(last_numbers_ptr + req)
    taken = tl.load(last_numbers_ptr + num_reqs + req)
    temperature = tl.load(temperature_ptr + row)
    prefix = hash_prefix(tl.load(seeds_ptr + row), tl.load(positions_ptr + row), 0)
    has_taken = taken > 0.0
    top = tl.load(numbers_ptr + TARGET_MAX * num_rows + row, mask=has_taken, other=0.0)
    inverse = tl.load(numbers_ptr + TARGET_INV * num_rows + row, mask=has_taken, other=1.0)
    draft_top = tl.load(numbers_ptr + DRAFT_MAX * num_rows + row, mask=has_taken, other=0.0)
    draft_inverse = tl.load(numbers_ptr + DRAFT_INV * num_rows + row, mask=has_taken, other=0.0)
    ratio = taken * draft_inverse / (weight * inverse)
    best = tl.full((), float("-inf"), tl.float32)
    best_token = tl.full((), 0, tl.int32)
    start = tl.program_id(1) * split_size
    end = tl.minimum(start + split_size, vocab_size)
    for block in range(start, end, BLOCK):
        tokens = block + tl.arange(0, BLOCK)
        in_row = tokens < end
        logits = tl.load(
            logits_ptr + row * logits_stride + tokens, mask=in_row, other=float("-inf")
        ).to(tl.float32)
        keep = in_row
        elder = tl.load(links_ptr + FIRST_CHILD * num_rows + row)
        for _ in range(elders):
            keep = keep & (tokens != tl.load(draft_tokens_ptr + elder))
            elder = tl.load(links_ptr + NEXT_SIBLING * num_rows + elder)
        scores = tl.where(keep, clean(logits), float("-inf"))
        if HAS_DRAFT:  # noqa: SIM102, a constexpr
            if has_taken:
                drafts = tl.load(
                    draft_logits_ptr + row * draft_logits_stride + tokens,
                    mask=in_row,
                    other=float("-inf"),
                ).to(tl.float32)
                odds = ratio * tl.exp((clean(drafts) - draft_top) - (clean(logits) - top))
                left = tl.maximum(1.0 - odds, TINY)
                scores = tl.where(scores == float("-inf"), scores, scores + tl.log(left))
        best, best_token = noised_argmax(best, best_token, scores, tokens, prefix, temperature)
    out = req * tl.num_programs(1) + tl.program_id(1)
    tl.store(best_ptr + out, best)
    tl.store(best_token_ptr + out, best_token)


@triton.jit
def _bonus_kernel(
    tokens_ptr, num_emitted_ptr, best_ptr, best_token_ptr, max_path, SPLITS: tl.constexpr
):
    req = tl.program_id(0).to(tl.int64)
    count = tl.load(num_emitted_ptr + req)
    if count > 0:
        part = req * SPLITS + tl.arange(0, SPLITS)
        best = tl.load(best_ptr + part)
        is_top = (best == tl.max(best, 0)) & (best > float("-inf"))
        token = tl.min(tl.where(is_top, tl.load(best_token_ptr + part), 0x7FFFFFFF), 0)
        token = tl.where(token == 0x7FFFFFFF, 0, token)
        tl.store(tokens_ptr + req * (max_path + 1) + count - 1, token.to(tl.int64))
