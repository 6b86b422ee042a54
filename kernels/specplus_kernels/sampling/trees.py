"""A ragged batch of token trees over flat rows, as the verification ops take it, and their result.

Rows cu_num_rows[r] .. cu_num_rows[r + 1] - 1 belong to request r: the root, then its draft nodes,
parents before children. Rows past cu_num_rows[-1] are padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch


@dataclass(frozen=True, slots=True)
class Batch:
    """The tensors of a batch besides its logits, and the bounds that fix grids and shapes."""

    draft_tokens: torch.Tensor  # [num_rows] int64; the root's is ignored, -1 is a placeholder
    parents: torch.Tensor | None  # [num_rows] int64, local row of the parent, root -1; None: chains
    cu_num_rows: torch.Tensor  # [num_reqs + 1] int32
    is_sampled: torch.Tensor | None  # [num_rows] bool; None: all that draft logits are given for
    temperature: torch.Tensor  # [num_rows] fp32
    seeds: torch.Tensor  # [num_rows] int64
    positions: torch.Tensor  # [num_rows] int64
    max_rows: int
    max_path: int

    @property
    def num_reqs(self) -> int:
        return len(self.cu_num_rows) - 1


class Verified(NamedTuple):
    """What a batch of requests emits; a request without rows emits nothing.

    The emitted tokens are the draft tokens of path[1:], then the bonus token.
    """

    tokens: torch.Tensor  # [num_reqs, max_path + 1] int64, padded with -1
    path: torch.Tensor  # [num_reqs, max_path + 1] int64, local rows, root first, padded with -1
    num_emitted: torch.Tensor  # [num_reqs] int32: the rows on the path


def empty_result(batch: Batch) -> Verified:
    """Unwritten memory of a result."""
    shape, device = (batch.num_reqs, batch.max_path + 1), batch.cu_num_rows.device
    tokens = torch.empty(shape, dtype=torch.int64, device=device)
    return Verified(tokens, torch.empty_like(tokens), torch.empty_like(batch.cu_num_rows[1:]))


def stack(batch: Batch, paths: list[list[int]], tokens: list[list[int]]) -> Verified:
    """A result from each request's path and tokens."""
    width, device = batch.max_path + 1, batch.cu_num_rows.device

    def padded(rows: list[list[int]]) -> torch.Tensor:
        full = [row + [-1] * (width - len(row)) for row in rows]
        return torch.tensor(full, dtype=torch.int64, device=device).view(-1, width)

    num_emitted = torch.tensor(list(map(len, paths)), dtype=torch.int32, device=device)
    return Verified(padded(tokens), padded(paths), num_emitted)


def check(batch: Batch, logits: torch.Tensor, draft_logits: torch.Tensor | None = None) -> None:
    """Raises ValueError where a shape, dtype or bound does not fit.

    On CPU tensors, where values can be read, also where a tree breaks the order or a bound, or a
    node is sampled from draft logits that are not there.
    """
    num_rows = len(batch.draft_tokens)
    _check_logits("logits", logits, num_rows)
    if draft_logits is not None:
        _check_logits("draft_logits", draft_logits, num_rows)
        if draft_logits.shape != logits.shape:
            raise ValueError(
                f"draft_logits {tuple(draft_logits.shape)} must have the shape of logits "
                f"{tuple(logits.shape)}; give tokens that the draft cannot draw -inf"
            )
    _check_rows(batch, num_rows)
    if batch.cu_num_rows.dim() != 1 or not len(batch.cu_num_rows):
        raise ValueError(f"cu_num_rows {tuple(batch.cu_num_rows.shape)} must be [num_reqs + 1]")
    if batch.cu_num_rows.dtype != torch.int32:
        raise ValueError(f"cu_num_rows must be int32, got {batch.cu_num_rows.dtype}")
    if not 0 <= batch.max_path < batch.max_rows:
        raise ValueError(
            f"max_path is {batch.max_path}, it must be in 0 .. max_rows - 1 = {batch.max_rows - 1}"
        )
    if batch.cu_num_rows.device.type == "cpu":
        _check_values(batch, draft_logits is not None)


def _check_values(batch: Batch, has_draft: bool) -> None:
    if not has_draft and batch.is_sampled is not None and bool(batch.is_sampled.any()):
        raise ValueError("is_sampled marks sampled nodes, which need draft_logits, got None")
    longest = max(batch.cu_num_rows.diff().tolist(), default=0)
    if longest > batch.max_rows:
        raise ValueError(f"a request has {longest} rows, max_rows allows {batch.max_rows}")
    if batch.parents is not None:
        _check_parents(batch.cu_num_rows.tolist(), batch.parents.tolist(), batch.max_path)
    elif longest > batch.max_path + 1:
        raise ValueError(f"a chain has {longest - 1} nodes, max_path allows {batch.max_path}")


def _check_logits(name: str, logits: torch.Tensor, num_rows: int) -> None:
    if logits.dim() != 2 or logits.shape[0] != num_rows or not logits.shape[1]:
        raise ValueError(f"{name} {tuple(logits.shape)} must be [{num_rows} rows, vocab_size >= 1]")
    if logits.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"{name} must be bf16, fp16 or fp32, got {logits.dtype}")
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(f"{name} must have contiguous rows, got strides {logits.stride()}")


def _check_rows(batch: Batch, num_rows: int) -> None:
    wanted = {
        "draft_tokens": (batch.draft_tokens, torch.int64),
        "parents": (batch.parents, torch.int64),
        "is_sampled": (batch.is_sampled, torch.bool),
        "temperature": (batch.temperature, torch.float32),
        "seeds": (batch.seeds, torch.int64),
        "positions": (batch.positions, torch.int64),
    }
    for name, (tensor, dtype) in wanted.items():
        if tensor is None:
            continue
        if tensor.shape != (num_rows,) or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be a contiguous [{num_rows}] {dtype}, got {tuple(tensor.shape)} "
                f"{tensor.dtype} with strides {tensor.stride()}"
            )


def _check_parents(starts: list[int], parents: list[int], max_path: int) -> None:
    for req, (start, end) in enumerate(pairwise(starts)):
        depths = [0]
        for row, parent in enumerate(parents[start + 1 : end], 1):
            if not 0 <= parent < row:
                raise ValueError(
                    f"parents of request {req}: row {row} has parent {parent}, it must be in "
                    f"0 .. {row - 1}"
                )
            depths.append(depths[parent] + 1)
        if max(depths) > max_path:
            raise ValueError(
                f"request {req} has a tree of depth {max(depths)}, max_path allows {max_path}"
            )
