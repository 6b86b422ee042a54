"""Exact verification of token trees.

Rule `match` (deterministic nodes): draw the target's own token at every row, then follow the nodes
that equal it. What is emitted is what the target model would have sampled without drafts, so the
rule is exact for greedy and sampled requests alike, and no rule accepts more of a deterministic
draft. (Greedy is sampling at temperature 0.)
"""

from __future__ import annotations

import torch

from vllm_specplus.core.tree import WORD_BITS, TreeBatch


def match(trees: TreeBatch, target_tokens: torch.Tensor) -> torch.Tensor:
    """The accepted path of every tree, root included.

    Args:
        trees: deterministic drafts.
        target_tokens: int64 [num_reqs, num_rows], the target's token after each row.

    Returns:
        bool [num_reqs, num_rows]: the rows on the accepted path. The emitted tokens are the target
        tokens of these rows in row order (accepted drafts, then the bonus token), because parents
        precede children and siblings differ.

    Raises:
        ValueError: for sampled drafts, for which matching would not follow the target's
            distribution optimally (use rule `rejection`, `block` or `traversal`).
    """
    if trees.is_sampled.any():
        raise ValueError(
            "verification rule 'match' was given sampled draft nodes; it takes deterministic ones, "
            "use rule 'rejection', 'block' or 'traversal'"
        )
    wanted = target_tokens.gather(1, trees.parents.clamp(min=0))
    missed = (trees.tokens != wanted) | (trees.tokens < 0)
    missed[:, 0] = False
    off_path = (trees.ancestor_mask & _pack(missed)[:, None]).ne(0).any(-1)
    return trees.valid() & ~off_path


def _pack(flags: torch.Tensor) -> torch.Tensor:
    """bool [num_reqs, num_rows] -> bitmask int64 [num_reqs, words]."""
    num_rows = flags.shape[1]
    words = -(-num_rows // WORD_BITS)
    padded = torch.nn.functional.pad(flags, (0, words * WORD_BITS - num_rows))
    bits = torch.arange(WORD_BITS, device=flags.device)
    return (padded.view(-1, words, WORD_BITS).long() << bits).sum(-1)
