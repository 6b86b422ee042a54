"""tree_rejection: verifies trees whose nodes were sampled, by one of three rules.

p is the target's distribution softmax(logits[row]), q the draft's softmax(draft_logits[row]), from
which the children of `row` were drawn one after the other, without replacement: child k follows q_k
= q without its elder siblings' tokens, renormalised. A deterministic node (is_sampled false) has a
point mass for its q_k. (.)+ clamps at 0, m is a measure, |m| its sum, x the token of a child.

recursive (SpecInfer: Miao et al. 2024, arXiv 2305.09781; Sequoia: Chen et al. 2024, arXiv
2402.12374). At a node m = p; each child in turn is accepted with probability min(1, m(x)/q_k(x)),
which moves on to that child; if it is not, m <- (m - q_k)+ / |(m - q_k)+|. The bonus follows m.
Exact: the pair "accept x from q_k, else draw from the residual" has the distribution m (Leviathan
et al. 2023, arXiv 2211.17192), whatever q_k is, so kinds may mix at will.

traversal (Weng et al. 2025, arXiv 2505.12398). Bottom-up: a node of weight w has m = w p; the
subtree of child k is searched first, with weight min(1, m(x) / q_k(x)); if it rejects,
m <- (m - q_k)+ / (1 - |m| + |(m - q_k)+|). When no child is left the node itself is accepted with
probability |m|, the root always, and the bonus token follows m / |m|. Exact, by induction over the
tree: suppose that each child's subtree, of weight v, ends in it with probability v and then follows
the target. Averaged over x ~ q_k that emits min(m, q_k) and rejects with probability
1 - |m| + |(m - q_k)+|; what is missing of m is (m - q_k)+, which the rest emits with the
conditional weight above. Nothing in this asks what q_k is, so kinds may mix at will here too.

typical (Medusa: Cai et al. 2024, arXiv 2401.10774). A child is likely if
p(x) > min(epsilon, delta exp(-H(p))), H the entropy; the path is the longest one of likely nodes
(the first in depth-first order), the bonus token follows p. NOT exact: it emits likely tokens
whatever their share. It needs no q.

What exactness needs of the drafter: siblings with different tokens, each drawn given its elders as
above; and whether a node gets children, and how many, must not depend on the draws of nodes that
are verified later (younger siblings and what is below them), nor on the noise of this op. Trees
grown top-down by depth or by rank satisfy it; pruning a tree after sampling by the scores of its
drawn nodes does not. At temperature 0 p is a point mass on the first maximum and both exact rules
accept exactly the children that are the argmax.

Random numbers (sampling/noise.py): a node's coin is keyed by the root's seed and position and the
node's row, the bonus token's Gumbel noise by the seed and position of the path's last row. Without
drafts the bonus token is the one that tree_verify and plain decoding draw. NaN counts as -inf;
children of a row with a NaN, in the target or in a used draft row, are never accepted.

>>> import torch
>>> p = torch.tensor([[0.5, 0.3, 0.2]] * 3).log()
>>> q = torch.tensor([[0.1, 0.2, 0.7]] * 3).log()
>>> def verify(rule, first, second, seed, **options):
...     result = tree_rejection(
...         rule, p, q, torch.tensor([-1, first, second]), torch.tensor([-1, 0, 0]),
...         torch.tensor([0, 3], dtype=torch.int32), None, torch.ones(3),
...         torch.full((3,), seed), torch.zeros(3, dtype=torch.int64), max_rows=3, **options)
...     return result.tokens.tolist()[0]

Two siblings, tokens 2 and 1. Token 2 is accepted with 0.2 / 0.7 = 0.29; with seed 1 the coin of row
1 shows 0.35, with seed 2 it shows 0.22. Where it is rejected, m = (0.4, 0.1, 0) / 0.5 = (0.8, 0.2,
0) and q_2 = (1/3, 2/3, 0): token 1 is accepted with 0.2 / (2/3) = 0.3, and its coin shows 0.66. Now
m = (0.8 - 1/3, 0, 0) up to its sum: the bonus is token 0.

>>> verify("recursive", 2, 1, seed=1)
[0, -1, -1]
>>> verify("recursive", 2, 1, seed=2)[0]
2

On one level traversal asks the same: a leaf of weight 0.29 is accepted with 0.29.

>>> verify("traversal", 2, 1, seed=1)
[0, -1, -1]
>>> verify("traversal", 2, 1, seed=2)[0]
2

H(p) = 1.03, exp(-H) = 0.36: with epsilon 0.3 and delta 0.6 the threshold is min(0.3, 0.21); token
2 falls short with 0.2, token 1 passes with 0.3.

>>> verify("typical", 2, 1, seed=1, epsilon=0.3, delta=0.6)[0]
1
"""

from __future__ import annotations

from typing import Literal

import torch

from specplus_kernels import dispatch
from specplus_kernels.sampling import trees
from specplus_kernels.sampling.trees import Verified
from specplus_kernels.tree_rejection import reference

__all__ = ["tree_rejection"]

TreeRule = Literal["recursive", "traversal", "typical"]


def tree_rejection(
    rule: TreeRule,
    logits: torch.Tensor,  # [num_rows, vocab_size] bf16, fp16 or fp32, after temperature, top-k ...
    draft_logits: torch.Tensor | None,  # [num_rows, vocab_size]; None: all nodes are deterministic
    draft_tokens: torch.Tensor,  # [num_rows] int64; the root's is ignored, -1 is no node
    parents: torch.Tensor
    | None,  # [num_rows] int64, local row of the parent, root -1; None: chains
    cu_num_rows: torch.Tensor,  # [num_reqs + 1] int32
    is_sampled: torch.Tensor | None,  # [num_rows] bool; None: all that draft_logits are given for
    temperature: torch.Tensor,  # [num_rows] fp32, 0: greedy, else only that it is not 0 counts
    seeds: torch.Tensor,  # [num_rows] int64
    positions: torch.Tensor,  # [num_rows] int64
    *,
    max_rows: int,
    max_path: int | None = None,
    epsilon: float = 0.09,
    delta: float = 0.3,
) -> Verified:
    """Returns the paths and tokens that `rule` emits.

    Args:
        rule: see the module's docstring.
        logits: each row contiguous, rows apart by any stride.
        draft_logits: row i holds the logits, temperature applied, from which the children of row i
            were drawn; rows without a drawn child are not read.
        draft_tokens: the token that each node proposes.
        parents: parents precede their children.
        cu_num_rows: where each request's rows begin; rows past the last are padding.
        is_sampled: whether a node was drawn from its parent's draft logits.
        temperature: already applied to `logits`; one per request.
        seeds: of each row's request.
        positions: of each row's token in its sequence.
        max_rows: the most rows of a request; fixes the grids.
        max_path: the most draft nodes on a path, max_rows - 1 by default.
        epsilon: of rule `typical`: the threshold's upper bound.
        delta: of rule `typical`: the threshold's share of exp(-entropy).

    Raises:
        ValueError: the rule is unknown, a shape or dtype does not fit, sampled nodes come without
            draft logits; on CPU tensors also when a tree breaks the order or a bound.

    """
    if rule not in ("recursive", "traversal", "typical"):
        raise ValueError(f"rule is {rule!r}, it must be 'recursive', 'traversal' or 'typical'")
    keyed = temperature, seeds, positions
    max_path = max_rows - 1 if max_path is None else max_path
    batch = trees.Batch(draft_tokens, parents, cu_num_rows, is_sampled, *keyed, max_rows, max_path)
    trees.check(batch, logits, draft_logits)
    if dispatch.provider(logits.device) == "triton":
        from specplus_kernels.tree_rejection import kernel

        return kernel.tree_rejection(rule, logits, draft_logits, batch, epsilon, delta)
    return reference.tree_rejection(rule, logits, draft_logits, batch, epsilon, delta)
