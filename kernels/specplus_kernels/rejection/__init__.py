"""rejection: verifies chains whose nodes were sampled, token by token or as a block.

p_i = softmax(logits[i]) is the target's distribution after row i, q_i = softmax(draft_logits[i])
the one that x, the token of row i + 1, was drawn from; (.)+ clamps at 0, u is the node's coin.

standard (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318):
    accept row i + 1 iff u < min(1, p_i(x) / q_i(x)), in order; after the first rejection the bonus
    token follows (p_i - q_i)+ / |(p_i - q_i)+|, after none p of the last row.
block (Sun et al. 2024, arXiv 2403.10444):
    w_0 = 1,  w_(i+1) = min(1, w_i p_i(x) / q_i(x))
    h_i = s_i / (s_i + 1 - w_i) with s_i = |(w_i p_i - q_i)+|, of the last row w_i
    the path ends at the last row i with u < h_i (the root if none), and the bonus token follows
    (w_i p_i - q_i)+ / s_i, at the last row p.

Both are exact: what is emitted follows the target. Block never accepts fewer tokens in expectation,
and identical p and q accept everything. A deterministic node (is_sampled false) has a point mass
for q_i, which keeps both exact for any mix along the chain; that its token was not drawn is no
matter, only that it does not depend on the coins. At temperature 0 p is a point mass on the first
maximum, so exactly the drafts that are the argmax are accepted.

The softmax of the rows with a child is one pass over p and q, online max and sum (Milakov and
Gimelshein 2018, arXiv 1805.02867); no probability is written. Standard reads one more row of p and
q a request, for the bonus token by Gumbel-max over the residual; block also reads a rejected row's
parent again for s_i. Random numbers, NaN and placeholders as in tree_rejection.

>>> import torch
>>> p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4]]).log()
>>> q = torch.tensor([[0.4, 0.4, 0.2], [0.2, 0.7, 0.1], [0.3, 0.3, 0.4]]).log()
>>> def verify(rule, seed):
...     result = rejection(
...         rule, p, q, torch.tensor([-1, 0, 1]), torch.tensor([0, 3], dtype=torch.int32), None,
...         torch.ones(3), torch.full((3,), seed), torch.zeros(3, dtype=torch.int64), max_rows=3)
...     return result.tokens.tolist()[0]

The draft is 0, 1. Standard: token 0 has p / q = 1.25 and is certain, token 1 is accepted with 0.1 /
0.7 = 0.14. With seed 0 the coins of rows 1 and 2 show 0.31 and 0.23, so the path ends at row 1, and
the bonus follows (0, 0, 0.7): it is token 2. With seed 3 they show 0.83 and 0.06.

>>> verify("standard", seed=0)
[0, 2, -1]
>>> verify("standard", seed=3)[:2]
[0, 1]

Block: w_1 = min(1, 1.25) = 1, so h_1 = 1; w_2 = 1 * 0.1 / 0.7 = 0.14 = h_2.

>>> verify("block", seed=0)
[0, 2, -1]
>>> verify("block", seed=3)[:2]
[0, 1]
"""

from __future__ import annotations

from typing import Literal

import torch

from specplus_kernels import dispatch
from specplus_kernels.rejection import reference
from specplus_kernels.sampling import trees
from specplus_kernels.sampling.trees import Verified

__all__ = ["rejection"]

ChainRule = Literal["standard", "block"]


def rejection(
    rule: ChainRule,
    logits: torch.Tensor,  # [num_rows, vocab_size] bf16, fp16 or fp32, after temperature, top-k ...
    draft_logits: torch.Tensor | None,  # [num_rows, vocab_size]; None: all nodes are deterministic
    draft_tokens: torch.Tensor,  # [num_rows] int64; the root's is ignored, -1 ends the chain
    cu_num_rows: torch.Tensor,  # [num_reqs + 1] int32
    is_sampled: torch.Tensor | None,  # [num_rows] bool; None: all that draft_logits are given for
    temperature: torch.Tensor,  # [num_rows] fp32, 0: greedy, else only that it is not 0 counts
    seeds: torch.Tensor,  # [num_rows] int64
    positions: torch.Tensor,  # [num_rows] int64
    *,
    max_rows: int,
) -> Verified:
    """Returns the paths and tokens that `rule` emits; max_path is max_rows - 1.

    Args:
        rule: see the module's docstring.
        logits: each row contiguous, rows apart by any stride.
        draft_logits: row i holds the logits, temperature applied, from which the token of row i + 1
            was drawn; a request's last row is not read.
        draft_tokens: the token that each node proposes.
        cu_num_rows: where each request's rows begin; rows past the last are padding.
        is_sampled: whether a node was drawn from the draft logits of the row before it.
        temperature: already applied to `logits`; one per request.
        seeds: of each row's request.
        positions: of each row's token in its sequence.
        max_rows: the most rows of a request; fixes the grids.

    Raises:
        ValueError: the rule is unknown, a shape or dtype does not fit, sampled nodes come without
            draft logits; on CPU tensors also when a request has more rows than `max_rows`.

    """
    if rule not in ("standard", "block"):
        raise ValueError(f"rule is {rule!r}, it must be 'standard' or 'block'")
    keyed = temperature, seeds, positions
    batch = trees.Batch(draft_tokens, None, cu_num_rows, is_sampled, *keyed, max_rows, max_rows - 1)
    trees.check(batch, logits, draft_logits)
    if dispatch.provider(logits.device) == "triton":
        from specplus_kernels.rejection import kernel

        return kernel.rejection(rule, logits, draft_logits, batch)
    return reference.rejection(rule, logits, draft_logits, batch)
