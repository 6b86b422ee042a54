"""tree_grow in plain torch, fp32."""

from __future__ import annotations

import torch

from specplus_kernels.tree_grow.rows import TreeRows, tree_rows

FLOOR, CEILING = -3e38, torch.finfo(torch.float32).max


def expand(
    logits: torch.Tensor,
    frontier: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    scores: torch.Tensor,
    *,
    start: int,
    k: int,
    next_width: int,
    d2t: torch.Tensor | None,
) -> torch.Tensor:
    """See the package's docstring."""
    num_reqs, width = frontier.shape
    logits = logits.float()
    logits = logits.where(logits > FLOOR, -torch.inf).clamp(max=CEILING)
    token = logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    logprobs = logits.log_softmax(-1).masked_fill(logits.isneginf(), -torch.inf).gather(1, token)
    absent = (0, k - token.shape[1])
    logprobs = torch.nn.functional.pad(logprobs, absent, value=-torch.inf)
    token = torch.nn.functional.pad(token, absent)
    above = scores.gather(1, frontier.clamp(min=0)).masked_fill(frontier < 0, 0.0)
    children = above.view(-1, 1) + logprobs
    if d2t is not None:
        token = d2t[token]
    level = slice(start, start + width * k)
    scores[:, level] = children.view(num_reqs, width * k)
    tokens[:, level] = token.masked_fill(children.isneginf(), 0).view(num_reqs, width * k)
    parents[:, level] = frontier.repeat_interleave(k, dim=1)
    order = scores[:, level].sort(dim=1, descending=True, stable=True).indices
    return start + order[:, :next_width]


def rerank(
    tokens: torch.Tensor,
    parents: torch.Tensor,
    scores: torch.Tensor,
    *,
    num_nodes: int,
    min_score: float,
) -> TreeRows:
    """See the package's docstring."""
    num_candidates = tokens.shape[1]
    order = scores.sort(dim=1, descending=True, stable=True).indices
    row_of = order.argsort(dim=1) + 1
    parent_rows = row_of.gather(1, parents.clamp(min=0)).masked_fill(parents < 0, 0)
    num_chosen = ((scores >= min_score) & ~scores.isneginf()).sum(1).clamp(max=num_nodes)
    best = torch.nn.functional.pad(order[:, :num_nodes], (0, max(0, num_nodes - num_candidates)))
    return tree_rows(tokens.gather(1, best), parent_rows.gather(1, best), num_chosen)
