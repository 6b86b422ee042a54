"""verify: one function over the rules of tree_verify, rejection and tree_rejection.

rule         drafts                          exact  source
match        deterministic, tree or chain    yes    tree_verify
rejection    chain, any mix of kinds         yes    Leviathan et al. 2023, arXiv 2211.17192
block        chain, any mix of kinds         yes    Sun et al. 2024, arXiv 2403.10444
recursive    tree or chain, any mix          yes    Miao et al. 2024, arXiv 2305.09781
traversal    tree or chain, any mix          yes    Weng et al. 2025, arXiv 2505.12398
typical      any, q is not used              NO     Cai et al. 2024, arXiv 2401.10774

The kind of q per node is `is_sampled`: sampled from the softmax of the parent's draft logits, or
deterministic, which is a point mass. What would not be exact, or not what the rule is for, is
refused; the lossy rule must be asked for twice. Each op's package docstring has the formulas and
worked examples of its rules.
"""

from __future__ import annotations

from typing import Literal

import torch

from specplus_kernels.rejection import ChainRule, rejection
from specplus_kernels.sampling.trees import Verified
from specplus_kernels.tree_rejection import tree_rejection
from specplus_kernels.tree_verify import tree_verify

__all__ = ["Rule", "Verified", "verify"]

Rule = Literal["match", "rejection", "block", "recursive", "traversal", "typical"]
RULES = ("match", "rejection", "block", "recursive", "traversal", "typical")


def verify(
    rule: Rule,
    logits: torch.Tensor,  # [num_rows, vocab_size] bf16, fp16 or fp32, after temperature, top-k ...
    draft_tokens: torch.Tensor,  # [num_rows] int64; the root's is ignored, -1 never matches
    cu_num_rows: torch.Tensor,  # [num_reqs + 1] int32
    temperature: torch.Tensor,  # [num_rows] fp32, 0: greedy, else only that it is not 0 counts
    seeds: torch.Tensor,  # [num_rows] int64
    positions: torch.Tensor,  # [num_rows] int64
    *,
    max_rows: int,
    parents: torch.Tensor | None = None,  # [num_rows] int64; None: chains
    draft_logits: torch.Tensor | None = None,  # [num_rows, vocab_size], of each row's children
    is_sampled: torch.Tensor | None = None,  # [num_rows] bool; None: all, if draft_logits are given
    max_path: int | None = None,
    allow_lossy: bool = False,
    epsilon: float = 0.09,
    delta: float = 0.3,
) -> Verified:
    """Returns what every request emits by `rule`; the arguments are those of the rules' ops.

    Greedy rows follow the argmax by every rule:

    >>> logits = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]]).log()
    >>> rows, starts = torch.zeros(2, dtype=torch.int64), torch.tensor([0, 2]).int()
    >>> batch = (logits, torch.tensor([-1, 0]), starts, torch.zeros(2), rows, rows)
    >>> [verify(rule, *batch, max_rows=2).tokens.tolist() for rule in ("match", "block")]
    [[[0, 1]], [[0, 1]]]

    Raises:
        ValueError: the rule is unknown, not exact or not meant for these drafts, or as the ops say.

    """
    _refuse(rule, parents, draft_logits, allow_lossy)
    keyed = (temperature, seeds, positions)
    if rule == "match":
        tree = (draft_tokens, parents, cu_num_rows)
        return tree_verify(logits, *tree, *keyed, max_rows=max_rows, max_path=max_path)[0]
    if rule == "rejection" or rule == "block":
        drawn = (draft_logits, draft_tokens, cu_num_rows, is_sampled)
        chain_rule: ChainRule = "standard" if rule == "rejection" else "block"
        return rejection(chain_rule, logits, *drawn, *keyed, max_rows=max_rows)
    if rule == "typical":
        draft_logits = is_sampled = None
    return tree_rejection(
        rule,
        logits,
        draft_logits,
        draft_tokens,
        parents,
        cu_num_rows,
        is_sampled,
        *keyed,
        max_rows=max_rows,
        max_path=max_path,
        epsilon=epsilon,
        delta=delta,
    )


def _refuse(
    rule: str, parents: torch.Tensor | None, draft_logits: torch.Tensor | None, allow_lossy: bool
) -> None:
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}, it must be one of {', '.join(map(repr, RULES))}")
    if rule == "match" and draft_logits is not None:
        raise ValueError(
            "rule 'match' takes deterministic nodes and was given draft_logits; use 'rejection' or "
            "'block' on chains of sampled nodes, 'recursive' or 'traversal' on trees"
        )
    if rule in ("rejection", "block") and parents is not None:
        raise ValueError(
            f"rule {rule!r} takes chains and was given parents; use 'recursive' or 'traversal'"
        )
    if rule == "typical" and not allow_lossy:
        raise ValueError(
            "rule 'typical' does not follow the target's distribution; pass allow_lossy=True to "
            "accept that, or use 'recursive' or 'traversal'"
        )
