"""The best tree of drafts that do not depend on each other, on the device.

Each depth has candidates of its own, the same after every node, so a path's score is the sum of its
levels' log-probabilities (Medusa, Cai et al. 2024, arXiv 2401.10774). A node is never above its
parent, so the best `num_nodes` of each level have the best `num_nodes` of all among them.
"""

from __future__ import annotations

import torch
from specplus_kernels.tree_grow import TreeRows, rerank


def best_products(
    tokens: torch.Tensor,  # [num_reqs, depth, num] int64, best first
    logprobs: torch.Tensor,  # [num_reqs, depth, num] fp32
    num_nodes: int,
) -> TreeRows:
    """The `num_nodes` likeliest nodes.

    >>> tokens, probs = torch.tensor([[[5, 6], [7, 8]]]), torch.tensor([[[0.6, 0.3], [0.7, 0.2]]])
    >>> best_products(tokens, probs.log(), 4).tokens.tolist()
    [[-1, 5, 7, 6, 7]]
    >>> best_products(tokens, probs.log(), 4).parents.tolist()
    [[-1, 0, 1, 0, 3]]
    """
    num_reqs, depth, num = tokens.shape
    scores = logprobs.new_zeros(num_reqs, 1)
    above = tokens.new_full((num_reqs, 1), -1)
    found = []
    start = 0
    for level in range(depth):
        below = (scores[:, :, None] + logprobs[:, level, None]).flatten(1)
        scores, index = below.topk(min(num_nodes, below.shape[1]))
        parents = above.gather(1, index // num)
        found.append((tokens[:, level].gather(1, index % num), parents, scores))
        above = torch.arange(start, start + index.shape[1], device=index.device).expand_as(index)
        start += index.shape[1]
    candidates = [torch.cat(parts, dim=1) for parts in zip(*found, strict=True)]
    return rerank(*candidates, num_nodes=num_nodes)
