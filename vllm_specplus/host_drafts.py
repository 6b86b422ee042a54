"""A proposer's drafts for an engine that verifies on a device and tells of no finished request."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from vllm_specplus.config import SpecPlusConfig
from vllm_specplus.core.tree import Tree
from vllm_specplus.proposers.base import DraftRequest
from vllm_specplus.round import SpecRound


class Verified(NamedTuple):
    """What a step verified of one request.

    num_nodes: draft nodes, a prefix of the last tree. path: rows of the accepted path, the root 0
    first, padded with -1. row_tokens: what the target said after each row; nothing where no row was
    a draft.
    """

    num_nodes: int = 0
    path: Sequence[int] = ()
    row_tokens: Sequence[int] = ()


class HostDrafts:
    """A round whose stage, verification and commit are the engine's own.

    Which nodes pay is the engine's to say: it verifies `DraftRequest.max_nodes` of each request.
    """

    def __init__(self, config: SpecPlusConfig) -> None:
        self.round = SpecRound(config.model_copy(update={"step_costs": None}))
        self._trees: dict[str, Tree] = {}

    def keep(self, req_ids: Collection[str]) -> None:
        """Forgets all other requests."""
        for req_id in self._trees.keys() - set(req_ids):
            del self._trees[req_id]
            self.round.forget(req_id)

    def next_trees(
        self, requests: Sequence[DraftRequest], verified: Sequence[Verified]
    ) -> list[Tree]:
        """The proposer learns from the last trees, and drafts; a depth of 0 is no root yet.

        Rows that it has no node for are filled as `core.tree.encode` does.
        """
        for request, (num_nodes, path, row_tokens) in zip(requests, verified, strict=True):
            tree = self._trees.get(request.req_id, Tree()).prefix(num_nodes)
            accepted = [row for row in path if row > 0]
            said = row_tokens or [int(request.token_ids[-1])]
            if request.max_depth and len(tree) == num_nodes:
                self.round.observe(request.req_id, tree, accepted, said)
        proposed = zip(requests, self.round.propose(requests), strict=True)
        trees = [_filled(tree, request) for request, tree in proposed]
        self._trees |= zip((request.req_id for request in requests), trees, strict=True)
        return trees


def _filled(tree: Tree, request: DraftRequest) -> Tree:
    rows = range(len(tree), request.max_nodes)
    filler = [int(request.token_ids[-1])] * len(rows)
    return Tree([*tree.tokens, *filler], [*tree.parents, *rows])
