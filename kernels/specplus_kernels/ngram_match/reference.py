"""ngram_match in plain torch, request by request."""

from __future__ import annotations

import torch

from specplus_kernels.tree_grow.rows import TreeRows, tree_rows


def ngram_match(
    tokens: torch.Tensor,
    lens: torch.Tensor,
    idx_mapping: torch.Tensor,
    *,
    min_n: int,
    max_n: int,
    num_nodes: int,
    max_depth: int,
    max_matches: int,
) -> TreeRows:
    """See the package's docstring."""
    num_reqs = len(idx_mapping)
    out = torch.zeros(2, num_reqs, num_nodes, dtype=torch.int64, device="cpu")
    num_found = torch.zeros(num_reqs, dtype=torch.int64, device="cpu")
    for req, slot in enumerate(idx_mapping.tolist()):
        history = tokens[slot, : int(lens[slot])]
        children: dict[tuple[int, int], int] = {}
        for end in _matches(history, min_n, max_n)[:max_matches]:
            row = 0
            for token in history[end + 1 : end + 1 + max_depth].tolist():
                row = children.setdefault((row, token), len(children) + 1)
        nodes = list(children)[:num_nodes]
        num_found[req] = len(nodes)
        for node, (parent, token) in enumerate(nodes):
            out[:, req, node] = torch.tensor([token, parent])
    drafted, parents = out.to(tokens.device)
    return tree_rows(drafted, parents, num_found.to(tokens.device))


def _matches(history: torch.Tensor, min_n: int, max_n: int) -> list[int]:
    """Positions that earlier matches end at, best first."""
    last = len(history) - 1
    equal = torch.zeros(max_n, max(last, 0), dtype=torch.int64, device=history.device)
    for n in range(min(max_n, last)):
        equal[n, n:] = history[: last - n] == history[last - n]
    lengths = equal.cumprod(0).sum(0)
    ends = torch.arange(max(last, 0), device=history.device)
    order = (lengths * (last + 1) + ends).argsort(descending=True)
    return order[lengths[order] >= min_n].tolist()
