"""rejection in plain torch, request by request, as the papers state the rules."""

from __future__ import annotations

import torch

from specplus_kernels.sampling.trees import Batch, Verified
from specplus_kernels.tree_rejection.reference import Tree, Walked, verify_each


def rejection(
    rule: str, logits: torch.Tensor, draft_logits: torch.Tensor | None, batch: Batch
) -> Verified:
    """See the package's docstring."""
    walk = _standard if rule == "standard" else _block
    return verify_each(walk, logits, draft_logits, batch)


def _standard(chain: Tree) -> Walked:
    """The first draft that p(x) / q(x) rejects ends the path; the bonus follows (p - q)+."""
    for node in range(1, _num_rows(chain)):
        p, q, token = _distributions(chain, node)
        if not chain.coins[node] * q[token] < p[token]:
            return node - 1, (p - q).clamp(min=0.0)
    last = _num_rows(chain) - 1
    return last, chain.target[last]


def _block(chain: Tree) -> Walked:
    """The last draft with coin < h ends the path; the bonus follows (w p - q)+."""
    num_rows = _num_rows(chain)
    accepted, weight = 0, 1.0
    residual = chain.target[0]
    for node in range(num_rows):
        if node > 0:
            p, q, token = _distributions(chain, node)
            weight = min(1.0, weight * float(p[token] / q[token])) if q[token] > 0 else 0.0
        measure, h = weight * chain.target[node], weight
        if node + 1 < num_rows:
            p, q, _ = _distributions(chain, node + 1)
            measure = (weight * p - q).clamp(min=0.0)
            h = float(measure.sum() / (measure.sum() + 1.0 - weight))
        if node == 0 or chain.coins[node] < h:
            accepted, residual = node, measure
    return accepted, residual


def _num_rows(chain: Tree) -> int:
    """Rows up to the first placeholder or row that holds a NaN."""
    return chain.children.index([]) + 1


def _distributions(chain: Tree, node: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """p and q that `node` is judged by, and its token."""
    rest = None if chain.draft is None else chain.draft[node - 1]
    return chain.target[node - 1], chain.proposal(node, rest), chain.tokens[node]
