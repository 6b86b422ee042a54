"""The speculative round, free of any engine: stage, verify, commit, propose.

An engine hands over flat rows (one per token of the step) and gets back, in this order: where the
tree rows stand and what they may see, which of them are accepted, which rows move, and the next
drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from vllm_specplus.config import SpecPlusConfig
from vllm_specplus.core.budget import RowBudget
from vllm_specplus.core.growth import Candidates, prune
from vllm_specplus.core.rank_counts import RankCounts
from vllm_specplus.core.stats import SpecStats
from vllm_specplus.core.tree import Tree, TreeBatch
from vllm_specplus.core.verify import match
from vllm_specplus.proposers.base import DraftRequest
from vllm_specplus.proposers.registry import create


@dataclass(frozen=True, slots=True)
class Staged:
    """The trees of a step and where their rows lie.

    row_index: int64 [num_reqs, num_rows], tree row -> row of the step; padding points at the root.
    logits_index: int64 [num_reqs, num_rows], tree row -> row of the logits, likewise.
    is_tree: bool [num_reqs], requests whose rows are a tree and nothing else. The others hold
    prompt rows before their root and are served by causal attention.
    branching: whether any tree is more than a chain. If none is, the host's sequential positions
    and causal attention are right as they are.
    """

    trees: TreeBatch
    row_index: torch.Tensor
    logits_index: torch.Tensor
    is_tree: torch.Tensor
    branching: bool

    def tree_positions(self, positions: torch.Tensor) -> None:
        """Rewrites sequential positions in place to the root's plus the node's depth.

        positions: int64 [..., rows of the step] (a leading axis for M-RoPE).
        """
        roots = positions[..., self.row_index[:, :1]]
        positions[..., self.row_index] = roots + self.trees.depths

    def row_masks(self, num_rows: int) -> torch.Tensor:
        """Ancestor bitmask of the step's rows over their tree's rows: int64 [num_rows, words]."""
        masks = torch.zeros(num_rows, self.trees.ancestor_mask.shape[-1], dtype=torch.int64)
        valid = self.trees.valid()
        masks[self.row_index[valid]] = self.trees.ancestor_mask[valid]
        return masks


@dataclass(frozen=True, slots=True)
class Moves:
    """Rows of the step whose content belongs elsewhere: int64 [num_moves] each.

    A row never moves forward and rows of a request come in ascending order, so moving them one by
    one never overwrites a row that is still to be read.
    """

    source: torch.Tensor
    target: torch.Tensor

    def __len__(self) -> int:
        return len(self.source)


class SpecRound:
    """One engine's round: holds the proposer, the row budget and the statistics."""

    def __init__(self, config: SpecPlusConfig) -> None:
        self.proposer = create(config)
        self.budget = RowBudget()
        if config.step_costs is not None:
            self.budget.measured(config.step_costs)
        self.max_depth = config.num_speculative_tokens
        self.stats = SpecStats(self.max_depth)
        self.ranks: RankCounts | None = None

    def count_ranks(self) -> None:
        """Counts which ranks are accepted from now on. Every draft gets its row and no level is
        left out, whatever they cost: what was never drafted is never right."""
        self.ranks, self.budget.cost = RankCounts(), None

    def stage(self, trees: Sequence[Tree], query_start_loc: np.ndarray) -> Staged:
        """Lays the trees over the step's rows: a request's last 1 + num_nodes rows are its tree.

        Args:
            trees: per request, possibly empty.
            query_start_loc: int [num_reqs + 1], first row of each request.
        """
        num_rows = np.diff(query_start_loc)
        trees = [
            tree if rows == len(tree) + 1 else tree.as_chain()
            for tree, rows in zip(trees, num_rows.tolist(), strict=True)
        ]
        batch = TreeBatch.from_trees(trees)
        num_logits = batch.num_nodes + 1
        offsets = torch.arange(batch.num_rows).where(batch.valid(), 0)
        roots = torch.from_numpy(query_start_loc[1:].astype(np.int64)) - num_logits
        return Staged(
            trees=batch,
            row_index=roots[:, None] + offsets,
            logits_index=(num_logits.cumsum(0) - num_logits)[:, None] + offsets,
            is_tree=torch.from_numpy(num_rows) == num_logits,
            branching=any(tree.branches for tree in trees),
        )

    def verify(self, staged: Staged, target_tokens: torch.Tensor) -> torch.Tensor:
        """The accepted paths, bool [num_reqs, num_rows], from the target's token per logits row."""
        return match(staged.trees, target_tokens[staged.logits_index])

    def commit(self, staged: Staged, on_path: torch.Tensor) -> Moves:
        """What must move so that every accepted path lies in contiguous rows behind its root."""
        rank = on_path.cumsum(1) - 1
        moved = on_path & (rank != torch.arange(on_path.shape[1]))
        targets = staged.row_index.gather(1, rank)
        return Moves(staged.row_index[moved], targets[moved])

    def propose(self, requests: Sequence[DraftRequest], row_ms: float = 0.0) -> list[Tree]:
        """The next trees: candidates, cut to the configured shape, then to what pays.

        row_ms: what a row costs beyond the target's forward pass.
        """
        least = self.budget.min_probs([request.req_id for request in requests])
        asked = [
            replace(request, min_prob=prob, token_ms=ms)
            for request, prob, ms in zip(requests, least, self.budget.token_ms(), strict=True)
            if prob < 1 and _may_draft(request)
        ]
        drafts = dict(zip((r.req_id for r in asked), self.proposer.propose(asked), strict=True))
        shaped = [self._shape(drafts.get(r.req_id, Candidates()), r) for r in requests]
        counts = self.budget.allocate([c.probs for c in shaped], [row_ms] * len(requests))
        self.stats.fallbacks["does_not_pay"] += sum(
            num == 0 and (len(candidates) > 0 or (prob >= 1 and _may_draft(request)))
            for num, candidates, prob, request in zip(counts, shaped, least, requests, strict=True)
        )
        granted = [candidates.prefix(n) for candidates, n in zip(shaped, counts, strict=True)]
        of_requests = dict(zip((r.req_id for r in requests), granted, strict=True))
        self.proposer.granted([of_requests[request.req_id] for request in asked])
        return [candidates.tree(len(candidates)) for candidates in granted]

    def observe(
        self, req_id: str, tree: Tree, accepted_rows: Sequence[int], row_tokens: Sequence[int]
    ) -> None:
        """Feeds what was verified back to the proposer."""
        if self.ranks is not None:
            self.ranks.observe(tree, accepted_rows)
        self.proposer.observe(req_id, tree, accepted_rows, row_tokens)

    def forget(self, req_id: str) -> None:
        """Drops all state of a finished request."""
        self.proposer.forget(req_id)

    def _shape(self, candidates: Candidates, request: DraftRequest) -> Candidates:
        """Cuts what a proposer may have grown beyond the static paths."""
        paths = self.proposer.paths(request)
        return candidates if paths is None else prune(candidates, paths)


def _may_draft(request: DraftRequest) -> bool:
    return min(request.max_nodes, request.max_depth) > 0
