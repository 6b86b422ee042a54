"""tree_verify in plain torch."""

from __future__ import annotations

from itertools import pairwise

import torch

from specplus_kernels.sampling import noise, trees
from specplus_kernels.sampling.trees import Batch, Verified

NOISE_ELEMENTS = 1 << 20  # drawn at a time


def tree_verify(logits: torch.Tensor, batch: Batch) -> tuple[Verified, torch.Tensor]:
    """See the package's docstring."""
    starts = batch.cu_num_rows.tolist()
    target = torch.full_like(batch.draft_tokens, -1)
    at_once = max(NOISE_ELEMENTS // logits.shape[1], 1)
    for first in range(0, starts[-1], at_once):
        rows = slice(first, min(first + at_once, starts[-1]))
        keys = batch.temperature[rows], batch.seeds[rows], batch.positions[rows]
        target[rows] = _tokens(logits[rows], *keys)
    wanted = target.masked_fill(logits.isnan().any(1), -1).tolist()
    drafts, emitted = batch.draft_tokens.tolist(), target.tolist()
    paths, tokens = [], []
    for start, end in pairwise(starts):
        above = range(-1, end - start - 1)
        parents = above if batch.parents is None else batch.parents[start:end].tolist()
        paths.append(_walk(drafts[start:end], parents, wanted[start:end]))
        tokens.append([emitted[start + node] for node in paths[-1]])
    return trees.stack(batch, paths, tokens), target


def _tokens(
    logits: torch.Tensor, temperature: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """The first token of the largest score."""
    scores = logits.float().masked_fill(logits.isnan(), -torch.inf)
    tokens = torch.arange(logits.shape[1], device=logits.device)
    noised = scores + noise.gumbel(seeds[:, None], positions[:, None], tokens)
    return torch.where((temperature == 0)[:, None], scores, noised).argmax(1)


def _walk(drafts: list[int], parents: range | list[int], wanted: list[int]) -> list[int]:
    """The rows of the path; `wanted` is -1 where nothing may match."""
    path = [0] if drafts else []
    for row in range(1, len(drafts)):
        if parents[row] == path[-1] and drafts[row] == wanted[path[-1]] >= 0:
            path.append(row)
    return path
