"""Medusa: heads beside the target's own draft several tokens from one hidden state.

Head k predicts the token k+2 places on, whatever lies between, so the candidates of a depth are the
same after every node, and a path's probability is the product of its heads' probabilities (Cai et
al. 2024, arXiv 2401.10774). n-gram matches may join as a second source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import exp
from typing import Protocol

import torch

from vllm_specplus.config import SpecPlusConfig
from vllm_specplus.core.growth import Candidates, Path, grow
from vllm_specplus.proposers.base import DraftRequest, Proposer
from vllm_specplus.proposers.calibration import Expectations
from vllm_specplus.proposers.ngram import NgramProposer
from vllm_specplus.proposers.registry import register
from vllm_specplus.proposers.sources import SourceCells, Sources

NUM_CHILDREN = 10
"""Candidates after a node, as many as the published trees take; wider static ones get more."""


class MedusaModel(Protocol):
    """What runs the heads; `heads.medusa.MedusaHeads` is one."""

    def best(
        self, hidden: torch.Tensor, num_heads: int, num: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The likeliest tokens of each head and their log-probabilities, best first:
        [num_rows, num_heads, num]. hidden: [num_rows, hidden_size]."""


@dataclass(slots=True)
class _Request:
    """hidden: the target's state at the last committed position, [hidden_size]; end: behind it."""

    hidden: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    end: int = 0
    num_tokens: int = 0
    expectations: Expectations = field(default_factory=Expectations)


@register("medusa", "medusa+ngram")
class MedusaProposer(Proposer):
    """Chains and trees of Medusa heads, with n-gram matches where they are asked for.

    model: what runs the heads; num_heads: how many there are. The engine sets both when it has
    loaded the target.
    """

    model: MedusaModel
    num_heads: int

    def __init__(self, config: SpecPlusConfig) -> None:
        super().__init__(config)
        ngrams = any(spec.name == "ngram" for spec in config.methods)
        self._ngrams = NgramProposer(config) if ngrams else None
        self._cells = SourceCells()
        self._requests: dict[str, _Request] = {}
        self._num = max(NUM_CHILDREN, *(1 + path[-1] for path in self._paths or [(0,)]))

    def absorb(self, req_id: str, start: int, hidden_states: torch.Tensor) -> None:
        state = self._requests.setdefault(req_id, _Request())
        state.hidden, state.end = hidden_states[-1].clone(), start + len(hidden_states)

    def propose(self, requests: Sequence[DraftRequest]) -> list[Candidates]:
        if not requests:
            return []
        states = [self._requests[request.req_id] for request in requests]
        num_heads = min(self.num_heads, self.config.num_speculative_tokens)
        hidden = torch.stack([state.hidden for state in states])
        found = self.model.best(hidden, num_heads, self._num)
        each = zip(requests, states, *(best.tolist() for best in found), strict=True)
        return [self._grow(*row) for row in each]

    def forget(self, req_id: str) -> None:
        self._requests.pop(req_id, None)
        if self._ngrams is not None:
            self._ngrams.forget(req_id)

    def _grow(
        self,
        request: DraftRequest,
        state: _Request,
        tokens: list[list[int]],
        logprobs: list[list[float]],
    ) -> Candidates:
        """The tree of one request from the best tokens of each head."""
        assert state.end == len(request.token_ids) - 1, (state.end, len(request.token_ids))
        state.expectations.settle(request.token_ids[state.num_tokens :].tolist())
        state.num_tokens = len(request.token_ids)
        levels = [
            {token: prob for token, prob in zip(*row, strict=True) if prob > 0}
            for row in zip(tokens, [[exp(x) for x in row] for row in logprobs], strict=True)
        ]

        def drafted(path: Path) -> Mapping[int, float]:
            return levels[len(path)] if len(path) < len(levels) else {}

        votes = None if self._ngrams is None else self._ngrams.votes(request)
        sources = Sources({"medusa": drafted}, votes, self._cells, state.expectations)
        bounds = request.max_nodes, request.max_depth, request.min_prob
        return grow(sources.expand, *bounds, self.paths(request))
