"""The trees of two draft models in one (SpecInfer, Miao et al. 2023, arXiv 2305.09781).

Each draft model grows a tree of its own. A token that both propose after the same path is one
candidate, and what each model and their agreement are worth is learned online.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from vllm_specplus.config import SpecPlusConfig
from vllm_specplus.core.growth import Candidates, grow
from vllm_specplus.proposers.base import DraftRequest, Proposer
from vllm_specplus.proposers.by_level import LevelProposer
from vllm_specplus.proposers.calibration import Expectations
from vllm_specplus.proposers.registry import register
from vllm_specplus.proposers.sources import Drafted, SourceCells, Sources


@dataclass(slots=True)
class _Request:
    num_tokens: int = 0
    expectations: Expectations = field(default_factory=Expectations)


@register("draft+draft")
class MergedProposer(Proposer):
    """parts: what drafts by each of the models."""

    def __init__(self, config: SpecPlusConfig) -> None:
        super().__init__(config)
        texts = [f"[{spec.name}]{spec.model}" for spec in config.methods]
        self.parts = [
            LevelProposer(config.model_copy(update={"speculative_model": text})) for text in texts
        ]
        self._cells = SourceCells()
        self._requests: dict[str, _Request] = {}
        self._drafted: list[list[Drafted]] = []

    def absorb(self, req_id: str, start: int, hidden_states: torch.Tensor) -> None:
        for part in self.parts:
            part.absorb(req_id, start, hidden_states)

    def propose(self, requests: Sequence[DraftRequest]) -> list[Candidates]:
        self._drafted = [[draft.after for draft in part.draft(requests)] for part in self.parts]
        of_requests = zip(requests, zip(*self._drafted, strict=True), strict=True)
        return [self._merge(request, drafted) for request, drafted in of_requests]

    def granted(self, drafts: Sequence[Candidates]) -> None:
        """A node that several parts propose counts for each in equal parts."""
        nodes = [draft.by_path() for draft in drafts]
        for of_request, drafted in zip(nodes, zip(*self._drafted, strict=True), strict=True):
            for path in of_request:
                of_request[path] /= sum(path[-1] in after(path[:-1]) for after in drafted)
        for part in self.parts:
            part.learn(nodes)
        self._drafted = []

    def forget(self, req_id: str) -> None:
        self._requests.pop(req_id, None)
        for part in self.parts:
            part.forget(req_id)

    def _merge(self, request: DraftRequest, drafted: Sequence[Drafted]) -> Candidates:
        state = self._requests.setdefault(request.req_id, _Request())
        state.expectations.settle(request.token_ids[state.num_tokens :].tolist())
        state.num_tokens = len(request.token_ids)
        named = {str(number): after for number, after in enumerate(drafted)}
        sources = Sources(named, None, self._cells, state.expectations)
        bounds = request.max_nodes, request.max_depth, request.min_prob
        return grow(sources.expand, *bounds, self.paths(request))


def by_levels(proposer: Proposer) -> list[LevelProposer]:
    """What drafts level by level in a proposer: itself, or its parts."""
    return [proposer] if isinstance(proposer, LevelProposer) else getattr(proposer, "parts", [])
