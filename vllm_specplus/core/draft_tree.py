"""A batch of trees that a draft model grows level by level, on the device.

Each level takes the logits behind the frontier's nodes, adds the best tokens there as candidates,
and continues the best of these; in the end the likeliest of all are the tree (EAGLE-2, Li et al.
2024, arXiv 2406.16858). The draft model runs a level as `width` paths of their own, root to node:
what paths share is run once for each, so that no shape and no mask depends on what was drafted.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from specplus_kernels.tree_grow import TreeRows, expand, rerank

from vllm_specplus.core.growth import MAX_FRONTIER, NUM_CHILDREN
from vllm_specplus.core.static_shape import StaticShape
from vllm_specplus.core.tree import MAX_ROWS, WORD_BITS, ancestor_words


def level_width(level: int, room: int) -> int:
    """How many paths of `level` nodes a request runs in `room` rows, which tree
    attention must mask; 0: none fits."""
    return min(MAX_FRONTIER, NUM_CHILDREN**level, min(room, MAX_ROWS) // level)


@lru_cache(maxsize=256)
def path_masks(width: int, length: int, device: torch.device) -> torch.Tensor:
    """Ancestor words of paths one behind the other, int64 [width * length, words]."""
    rows = [((2 << row) - 1) << path * length for path in range(width) for row in range(length)]
    words = -(-len(rows) // WORD_BITS)
    return torch.from_numpy(ancestor_words(rows, words).view("int64")).to(device)


class DraftTree:
    """Trees while they grow.

    chain_only: bool [num_reqs], requests that get the likeliest chain. shape: the only nodes there
    may be. frontier: int64 [num_reqs, width], candidates, best first. paths: int64 [num_reqs,
    width, depth], their tokens from the root down.
    """

    def __init__(
        self, num_levels: int, chain_only: torch.Tensor, shape: StaticShape | None
    ) -> None:
        num_reqs, device = len(chain_only), chain_only.device
        most = NUM_CHILDREN * (1 + MAX_FRONTIER * (num_levels - 1))
        self._tokens = torch.zeros(num_reqs, most, dtype=torch.int64, device=device)
        self._parents = torch.zeros_like(self._tokens)
        self._scores = torch.zeros(num_reqs, most, device=device)
        self._size = 0
        self._chain_only, self._shape = chain_only[:, None], shape
        self._shape_rows = torch.zeros(num_reqs, 1, dtype=torch.int64, device=device)
        self.frontier = torch.full((num_reqs, 1), -1, dtype=torch.int64, device=device)
        self.paths = torch.empty(num_reqs, 1, 0, dtype=torch.int64, device=device)

    def branch(
        self, logits: torch.Tensor, width: int, drafts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Adds the candidates after the frontier, the best `width` of which are the next one.

        logits: [num_reqs * frontier's width, vocab_size]. drafts: bool [num_reqs], False where what
        was run means nothing.

        Returns:
            Which node of the frontier before is above each of the new one: int64 [num_reqs, width].

        """
        start, num = self._size, self.frontier.shape[1] * NUM_CHILDREN
        self._size = start + num
        candidates = self._tokens, self._parents, self._scores
        expand(logits, self.frontier, *candidates, start=start, k=NUM_CHILDREN)
        scores = self._scores[:, start : self._size]
        order = torch.arange(num, device=scores.device)
        refused = self._chain_only & (order > 0)
        if drafts is not None:
            refused = refused | ~drafts[:, None]
        if self._shape is not None:
            rows = self._shape.children(self._shape_rows, NUM_CHILDREN)
            refused = refused | (rows < 0)
        scores.masked_fill_(refused, -torch.inf)
        if self._shape is not None:
            scores = scores.masked_fill(~self._shape.has_children(rows), -torch.inf)
        best = scores.sort(dim=1, descending=True, stable=True).indices[:, :width]
        if self._shape is not None:
            self._shape_rows = rows.gather(1, best)
        above, self.frontier = best // NUM_CHILDREN, start + best
        token = self._tokens.gather(1, self.frontier)
        self.paths = torch.cat([below(self.paths, above), token[:, :, None]], 2)
        return above

    def rows(self, num_nodes: int) -> TreeRows:
        """The likeliest nodes, best first: a tree, and so is every prefix."""
        filled = (part[:, : self._size] for part in (self._tokens, self._parents, self._scores))
        return rerank(*filled, num_nodes=num_nodes)


def below(values: torch.Tensor, above: torch.Tensor) -> torch.Tensor:
    """What each node has of the one above it: [num_reqs, width, ...] out of [num_reqs, _, ...]."""
    request = torch.arange(len(above), device=above.device)[:, None]
    return values[request, above]
