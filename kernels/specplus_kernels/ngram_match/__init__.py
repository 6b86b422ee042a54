"""ngram_match: what followed earlier occurrences of a sequence's last tokens, as a tree.

Prompt lookup (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding) continues one match; here
several are merged. With h the history and L its length,

    n(p)    = how many tokens up to h[p] equal the last ones, at most max_n       (p < L - 1)
    matches = the max_matches positions of the largest n(p) >= min_n, of equals the most recent
    tree    = the trie of h[p+1], ..., h[p+max_depth] (up to the history's end) over the matches

Nodes are numbered match by match, each from where it leaves those before it: so the first rows are
the chain that prompt lookup drafts, every prefix is a tree, and the first `num_nodes` are kept.

On a GPU two launches: programs over requests and parts of the history read it once and keep each
part's best positions; one program per request merges them. The trie needs no nodes: match m shares
s tokens with the earlier match that it has most in common with, so its own rows are its tokens from
the s-th on, below row s of that match. Grids depend on shapes alone.
"""

from __future__ import annotations

import torch

from specplus_kernels import dispatch
from specplus_kernels.ngram_match import reference
from specplus_kernels.tree_grow.rows import MAX_ROWS, TreeRows

__all__ = ["ngram_match"]

MAX_N = 16
MAX_MATCHES = 16


def ngram_match(
    tokens: torch.Tensor,  # [num_slots, max_len] int32 or int64
    lens: torch.Tensor,  # [num_slots] int32 or int64
    idx_mapping: torch.Tensor | None = None,  # [num_reqs] int32 or int64
    *,
    min_n: int,
    max_n: int,
    num_nodes: int,
    max_depth: int,
    max_matches: int = 8,
) -> TreeRows:
    """Drafts a tree for each request from its own history.

    Args:
        tokens: histories, the last sampled token included; the rest of a row may hold anything.
        lens: how many tokens each history has.
        idx_mapping: the slot of each request; None: all slots, in order.
        min_n: a shorter match is none.
        max_n: longer matches count as this long; at most 16.
        num_nodes: of a tree, at most 127.
        max_depth: tokens after a match.
        max_matches: at most 16. Matches with like continuations count each.

    Raises:
        ValueError: a shape, dtype or number does not fit.

    """
    _check(tokens, lens, idx_mapping)
    if not (1 <= min_n <= max_n <= MAX_N and 1 <= max_matches <= MAX_MATCHES):
        raise ValueError(
            f"min_n {min_n} and max_n {max_n} must be ordered in [1, {MAX_N}], max_matches "
            f"{max_matches} in [1, {MAX_MATCHES}]"
        )
    if not (0 <= num_nodes < MAX_ROWS and 1 <= max_depth < MAX_ROWS):
        raise ValueError(
            f"num_nodes {num_nodes} must be in [0, {MAX_ROWS}), max_depth {max_depth} in "
            f"[1, {MAX_ROWS})"
        )
    if dispatch.provider(tokens.device) == "triton":
        from specplus_kernels.ngram_match.kernel import ngram_match as run
    else:
        run = reference.ngram_match
    return run(
        tokens,
        lens,
        torch.arange(len(lens), device=lens.device) if idx_mapping is None else idx_mapping,
        min_n=min_n,
        max_n=max_n,
        num_nodes=num_nodes,
        max_depth=max_depth,
        max_matches=max_matches,
    )


def _check(tokens: torch.Tensor, lens: torch.Tensor, idx_mapping: torch.Tensor | None) -> None:
    if tokens.dim() != 2 or lens.shape != tokens.shape[:1]:
        raise ValueError(
            f"tokens {tuple(tokens.shape)} and lens {tuple(lens.shape)} must be "
            "[num_slots, max_len] and [num_slots]"
        )
    if idx_mapping is not None and idx_mapping.dim() != 1:
        raise ValueError(f"idx_mapping {tuple(idx_mapping.shape)} must be [num_reqs]")
    dtypes = [x.dtype for x in (tokens, lens, idx_mapping) if x is not None]
    if not {torch.int32, torch.int64}.issuperset(dtypes):
        raise ValueError(f"tokens, lens and idx_mapping must be int32 or int64, got {dtypes}")
