"""What a proposer that drafts for a device is told; no engine is started here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from vllm_specplus.config import SpecPlusConfig
from vllm_specplus.core.growth import Candidates
from vllm_specplus.core.tree import Tree
from vllm_specplus.host_drafts import HostDrafts, Verified
from vllm_specplus.proposers.base import DraftRequest, Proposer

TREE = Tree([5, 6, 7], [0, 0, 1])
FILLED = Tree([5, 6, 7, 9, 9], [0, 0, 1, 3, 4])


class Recorder(Proposer):
    """Proposes one tree; keeps what it hears."""

    def __init__(self, config: SpecPlusConfig) -> None:
        super().__init__(config)
        self.heard: list[Any] = []
        self.forgotten: list[str] = []

    def propose(self, requests: Sequence[DraftRequest]) -> list[Candidates]:
        return [Candidates(TREE.tokens, TREE.parents, [0.5, 0.4, 0.3]) for _ in requests]

    def observe(self, *args: Any) -> None:
        self.heard.append(args)

    def forget(self, req_id: str) -> None:
        self.forgotten.append(req_id)


def request(req_id: str, max_depth: int = 3) -> DraftRequest:
    return DraftRequest(req_id, np.array([8, 9], np.int32), max_depth, max_nodes=5)


@pytest.fixture
def drafts() -> Any:
    options = {"speculative_model": "[ngram]", "tree": "dynamic:5"}
    host = HostDrafts(SpecPlusConfig.from_options(options | {"num_speculative_tokens": 3}))
    host.round.proposer = Recorder(host.round.proposer.config)
    return host


def test_rows_without_a_node_are_filled_and_heard_of(drafts: Any) -> None:
    assert drafts.next_trees([request("a")], [Verified()]) == [FILLED]
    said = [5, 7, 0, 9, 9, 3]
    drafts.next_trees([request("a")], [Verified(5, [0, 1, 3, 4, 5, -1], said)])
    first, second = drafts.round.proposer.heard
    assert first == ("a", Tree(), [], [9])
    assert second == ("a", FILLED, [1, 3, 4, 5], said)


def test_drafts_that_were_cut_and_chunks_of_prompts(drafts: Any) -> None:
    both = [request("a"), request("b", max_depth=0)]
    assert drafts.next_trees(both, [Verified()] * 2) == [FILLED, Tree([9] * 5, [*range(5)])]
    drafts.next_trees(both, [Verified(2, [0, 1, -1], [5, 1, 2]), Verified()])
    assert drafts.round.proposer.heard[1:] == [("a", TREE.prefix(2), [1], [5, 1, 2])]


def test_rows_of_a_tree_that_is_not_known_are_not_heard_of(drafts: Any) -> None:
    drafts.next_trees([request("a")], [Verified(2, [0, 1, -1], [5, 1, 2])])
    assert drafts.round.proposer.heard == []


def test_requests_that_are_gone_are_forgotten(drafts: Any) -> None:
    drafts.next_trees([request("a"), request("b")], [Verified()] * 2)
    drafts.keep({"b": 0, "c": 1})
    drafts.keep({"b": 0})
    assert drafts.round.proposer.forgotten == ["a"]
