"""tree_grow: EAGLE-2's dynamic draft trees (Li et al. 2024, arXiv 2406.16858): expand and rerank.

A candidate's score estimates the log-probability that its whole path is accepted:

    score(child) = score(parent) + log_softmax(logits[parent])[token]         (root: 0)

`expand` grows one level: the k best tokens after each of the `width` frontier nodes become
candidates, and the best of the width * k new ones are the next frontier. `rerank` picks the tree
that is verified from all candidates of all levels: the best scores first, the earlier candidate
where they tie. A child's score is never above its parent's and its index always is, so parents come
before their children and every prefix of the nodes is a tree: this is best-first growth.

NaN logits, and those below -3e38 as masks leave them, are -inf; +inf is the largest finite number.
A child of logit -inf, and one beyond the vocabulary, scores -inf (token 0, so that a drafter may be
fed with it) and is never chosen.

On a GPU `expand` takes two launches: programs over rows and parts of the vocabulary read the logits
once for the sum of exponentials and the part's k best; one program per request merges these, adds
the candidates and picks the frontier. Neither probabilities nor sorted logits are ever stored.
`rerank` takes two as well: ranks, by counting; then rows, with depths and ancestors by pointer
doubling.
"""

from __future__ import annotations

import torch

from specplus_kernels import dispatch
from specplus_kernels.tree_grow import reference
from specplus_kernels.tree_grow.rows import MAX_ROWS, TreeRows

__all__ = ["TreeRows", "expand", "rerank"]

MAX_WIDTH = 16


def expand(
    logits: torch.Tensor,  # [num_reqs * width, vocab_size] bf16, fp16 or fp32, any strides
    frontier: torch.Tensor,  # [num_reqs, width] int64, candidates; -1: the root
    tokens: torch.Tensor,  # [num_reqs, max_candidates] int64, changed in place
    parents: torch.Tensor,  # [num_reqs, max_candidates] int64, likewise; -1: the root
    scores: torch.Tensor,  # [num_reqs, max_candidates] fp32, likewise
    *,
    start: int,
    k: int,
    next_width: int = 1,
    d2t: torch.Tensor | None = None,  # [vocab_size] int64
) -> torch.Tensor:
    """Adds the children of the frontier as candidates start to start + width * k - 1.

    Args:
        logits: one row after each frontier node.
        frontier: what the level above returned; for the first level a column of -1.
        tokens: of the candidates.
        parents: of the candidates, as candidates.
        scores: of the candidates.
        start: how many candidates the levels above have added.
        k: children per frontier node.
        next_width: nodes of the next frontier.
        d2t: the target model's token for each of the draft model's, where their vocabularies
            differ. (EAGLE-3 checkpoints store the difference to the index.)

    Returns:
        The next frontier, best first: [num_reqs, next_width] int64, candidates.

    Raises:
        ValueError: a shape, dtype or number does not fit.

    """
    _check_candidates(tokens, parents, scores)
    _check_expand(logits, frontier, tokens, start, k, next_width, d2t)
    if dispatch.provider(logits.device) == "triton":
        from specplus_kernels.tree_grow.kernel import expand as run
    else:
        run = reference.expand
    return run(
        logits,
        frontier,
        tokens,
        parents,
        scores,
        start=start,
        k=k,
        next_width=next_width,
        d2t=d2t,
    )


def rerank(
    tokens: torch.Tensor,  # [num_reqs, num_candidates] int64
    parents: torch.Tensor,  # [num_reqs, num_candidates] int64
    scores: torch.Tensor,  # [num_reqs, num_candidates] fp32, not NaN
    *,
    num_nodes: int,
    min_score: float = -torch.inf,
) -> TreeRows:
    """The best `num_nodes` candidates of each request, as rows; fewer where there are fewer.

    Args:
        tokens: as `expand` leaves them; pass the columns that are filled.
        parents: likewise.
        scores: likewise.
        num_nodes: at most 127.
        min_score: candidates below it are left out.

    Raises:
        ValueError: a shape, dtype or number does not fit.

    """
    _check_candidates(tokens, parents, scores)
    if not 0 <= num_nodes < MAX_ROWS or not tokens.shape[1]:
        raise ValueError(
            f"num_nodes {num_nodes} must be in [0, {MAX_ROWS}) and candidates "
            f"{tuple(tokens.shape)} at least one"
        )
    if dispatch.provider(scores.device) == "triton":
        from specplus_kernels.tree_grow.kernel import rerank as run
    else:
        run = reference.rerank
    return run(tokens, parents, scores, num_nodes=num_nodes, min_score=min_score)


def _check_candidates(tokens: torch.Tensor, parents: torch.Tensor, scores: torch.Tensor) -> None:
    if (tokens.dtype, parents.dtype, scores.dtype) != (torch.int64, torch.int64, torch.float32):
        raise ValueError(
            "tokens, parents and scores must be int64, int64 and float32, got "
            f"{tokens.dtype}, {parents.dtype} and {scores.dtype}"
        )
    if not tokens.shape == parents.shape == scores.shape or tokens.dim() != 2:
        raise ValueError(
            f"tokens {tuple(tokens.shape)}, parents {tuple(parents.shape)} and scores "
            f"{tuple(scores.shape)} must all be [num_reqs, max_candidates]"
        )
    if {tokens.stride(1), parents.stride(1), scores.stride(1)} != {1}:
        raise ValueError("tokens, parents and scores must be contiguous within a request")


def _check_expand(
    logits: torch.Tensor,
    frontier: torch.Tensor,
    tokens: torch.Tensor,
    start: int,
    k: int,
    next_width: int,
    d2t: torch.Tensor | None,
) -> None:
    num_reqs, width = frontier.shape
    if logits.dim() != 2 or logits.shape[0] != num_reqs * width or len(tokens) != num_reqs:
        raise ValueError(
            f"logits {tuple(logits.shape)}, frontier {tuple(frontier.shape)} and tokens "
            f"{tuple(tokens.shape)} must be [num_reqs * width, vocab_size], [num_reqs, width] and "
            "[num_reqs, max_candidates]"
        )
    if logits.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"logits must be bfloat16, float16 or float32, got {logits.dtype}")
    if frontier.dtype != torch.int64 or frontier.stride(1) != 1:
        raise ValueError(f"frontier must be int64 and contiguous by rows, got {frontier.dtype}")
    if not (1 <= k <= MAX_WIDTH and 1 <= width <= MAX_WIDTH and 1 <= next_width <= width * k):
        raise ValueError(
            f"k {k} and width {width} must be in [1, {MAX_WIDTH}], next_width {next_width} in "
            f"[1, {width * k}], the children of this level"
        )
    if start < 0 or start + width * k > tokens.shape[1]:
        raise ValueError(
            f"start {start} and {width * k} children do not fit {tokens.shape[1]} candidates"
        )
    if d2t is not None and (d2t.dtype != torch.int64 or d2t.shape != logits.shape[1:]):
        raise ValueError(f"d2t {tuple(d2t.shape)} {d2t.dtype} must be [{logits.shape[1]}] int64")
