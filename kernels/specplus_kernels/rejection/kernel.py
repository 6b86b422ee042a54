"""rejection in Triton: a chain is a tree of width 1.

On a chain the recursive rule is standard rejection, and traversal is block verification (Weng et
al. 2025, arXiv 2505.12398): the weight of node i is Sun's w_i, what its mass becomes when node
i + 1 is rejected is Sun's h_i, and the first acceptance from the end is the last in Sun's order.
"""

from __future__ import annotations

import torch

from specplus_kernels.sampling.trees import Batch, Verified
from specplus_kernels.tree_rejection import kernel

ON_TREES = {"standard": "recursive", "block": "traversal"}


def rejection(
    rule: str, logits: torch.Tensor, draft_logits: torch.Tensor | None, batch: Batch
) -> Verified:
    """See the package's docstring."""
    return kernel.tree_rejection(ON_TREES[rule], logits, draft_logits, batch, 0.0, 0.0)
