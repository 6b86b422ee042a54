"""tree_verify: the target model's own tokens, and the draft nodes that they walk through.

    y_i  = argmax_x logits[i, x]                 at temperature 0
         = argmax_x logits[i, x] + g_i(x)        otherwise, g_i(x) Gumbel noise (sampling/noise.py)
    path = root, then from node i to its child whose token is y_i, while there is one
    emitted tokens = y_i of the path's rows

y_i is a sample of softmax(logits[i]) (Gumbel 1954; Maddison et al. 2014, arXiv 1411.0030), drawn
whether or not there are drafts: what is emitted is what plain decoding with the same noise emits,
bit for bit. Exact for every draft that does not look at this noise, deterministic ones above all,
of which no rule accepts more; SpecInfer calls it naive sampling (Miao et al. 2024, arXiv
2305.09781). The noise is keyed by the row's seed and position as vLLM 0.32's V2 sampler keys it.

Grid: (num_rows, splits of the vocabulary), then (num_reqs). The logits are read once; neither
noise nor probabilities are materialised.

The target is (0.5, 0.3, 0.2) at the root and (0.1, 0.1, 0.8) below; the drafts are tokens 0 and 1
side by side. At temperature 0 the root's token is 0, so row 1 is accepted and token 2 follows. With
the noise of seed 1 the root's scores are (0.00, -0.93, -0.65), with that of seed 2 they are (-1.19,
1.94, 5.43): token 2 wins, which no draft proposed.

>>> import torch
>>> logits = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.1, 0.1, 0.8]]).log()
>>> def verify(temperature, seed):
...     result, tokens = tree_verify(
...         logits, torch.tensor([-1, 0, 1]), torch.tensor([-1, 0, 0]), torch.tensor([0, 3]).int(),
...         torch.full((3,), temperature), torch.full((3,), seed), torch.tensor([9, 10, 10]),
...         max_rows=3)
...     return result.tokens[0].tolist()
>>> verify(0.0, seed=0)
[0, 2, -1]
>>> verify(1.0, seed=1)
[0, 2, -1]
>>> verify(1.0, seed=2)
[2, -1, -1]
"""

from __future__ import annotations

import torch

from specplus_kernels import dispatch
from specplus_kernels.sampling import trees
from specplus_kernels.sampling.trees import Verified
from specplus_kernels.tree_verify import reference

__all__ = ["tree_verify"]


def tree_verify(
    logits: torch.Tensor,  # [num_rows, vocab_size] bf16, fp16 or fp32, after temperature, top-k ...
    draft_tokens: torch.Tensor,  # [num_rows] int64; the root's is ignored, -1 never matches
    parents: torch.Tensor
    | None,  # [num_rows] int64, local row of the parent, root -1; None: chains
    cu_num_rows: torch.Tensor,  # [num_reqs + 1] int32
    temperature: torch.Tensor,  # [num_rows] fp32, 0: greedy, else only that it is not 0 counts
    seeds: torch.Tensor,  # [num_rows] int64
    positions: torch.Tensor,  # [num_rows] int64
    *,
    max_rows: int,
    max_path: int | None = None,
) -> tuple[Verified, torch.Tensor]:
    """Returns the result and every row's token y, [num_rows] int64, -1 on padding rows.

    The first of equals wins. NaN counts as -inf, a row of nothing else gives token 0; the children
    of a row that holds a NaN never match. Of siblings with one token the first matches.

    Args:
        logits: each row contiguous, rows apart by any stride.
        draft_tokens: the token that each node proposes.
        parents: parents precede their children.
        cu_num_rows: where each request's rows begin; rows past the last are padding.
        temperature: already applied to `logits`.
        seeds: of each row's request.
        positions: of each row's token in its sequence.
        max_rows: the most rows of a request; fixes the grids.
        max_path: the most draft nodes on a path, max_rows - 1 by default.

    Raises:
        ValueError: a shape or dtype does not fit; on CPU tensors also when a tree breaks the order
            or a bound.

    """
    batch = trees.Batch(
        draft_tokens,
        parents,
        cu_num_rows,
        None,
        temperature,
        seeds,
        positions,
        max_rows,
        max_rows - 1 if max_path is None else max_path,
    )
    trees.check(batch, logits)
    if dispatch.provider(logits.device) == "triton":
        from specplus_kernels.tree_verify import kernel

        return kernel.tree_verify(logits, batch)
    return reference.tree_verify(logits, batch)
