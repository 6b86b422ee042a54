"""Medusa: heads beside the target's own draft several tokens from one hidden state.

Head k predicts the token k+2 places on, whatever lies between, so the candidates of a depth are the
same after every node, and a path's probability is the product of its heads' probabilities (Cai et
al. 2024, arXiv 2401.10774). n-gram matches may join as a second source. The heads run only where
what they bring is worth the time that they take (level_gate.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp
from typing import Protocol

import torch

from vllm_specplus.config import SpecPlusConfig
from vllm_specplus.core.growth import Candidates, Path, grow
from vllm_specplus.proposers.base import DraftRequest, Proposer
from vllm_specplus.proposers.calibration import Expectations
from vllm_specplus.proposers.level_gate import LevelGate, Prospect
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


@dataclass(frozen=True, slots=True)
class _Run:
    """The heads ran in `ms`. known: per request, the nodes of n-grams alone and their
    probabilities."""

    prospects: Sequence[Prospect]
    known: Sequence[Mapping[Path, float]]
    ms: float


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
        self._gate = LevelGate(1)
        self._ran: _Run | None = None
        self._num = max(NUM_CHILDREN, *(1 + path[-1] for path in self._paths or [(0,)]))

    def absorb(self, req_id: str, start: int, hidden_states: torch.Tensor) -> None:
        state = self._requests.setdefault(req_id, _Request())
        state.hidden, state.end = hidden_states[-1].clone(), start + len(hidden_states)

    def measure_heads(self, target: Callable[[], object], hidden: torch.Tensor) -> None:
        """Times the heads over rows of `hidden`, [num_rows, hidden_size] (`LevelGate.measure`)."""
        self._gate.measure(lambda num_rows: self._best(hidden[:num_rows]), len(hidden), target)

    def propose(self, requests: Sequence[DraftRequest]) -> list[Candidates]:
        if not requests:
            return []
        began = time.perf_counter()
        states = [self._settled(request) for request in requests]
        drafts = [self._grow(request, []) for request in requests]  # of n-grams alone
        prospects = [self._prospect(*each) for each in zip(requests, drafts, strict=True)]
        if not self._gate.opens(0, prospects):
            return drafts
        found = self._best(torch.stack([state.hidden for state in states]))
        known = [draft.by_path() for draft in drafts]
        levels = zip(requests, *(best.tolist() for best in found), strict=True)
        drafts = [self._grow(request, _levels(*best)) for request, *best in levels]
        self._ran = _Run(prospects, known, 1e3 * (time.perf_counter() - began))
        return drafts

    def granted(self, drafts: Sequence[Candidates]) -> None:
        if self._ran is not None:
            gains = [
                sum(prob - known.get(path, 0.0) for path, prob in draft.by_path().items())
                for draft, known in zip(drafts, self._ran.known, strict=True)
            ]
            self._gate.observe(0, self._ran.prospects, gains, self._ran.ms)
            self._ran = None

    def _best(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        num_heads = min(self.num_heads, self.config.num_speculative_tokens)
        return self.model.best(hidden, num_heads, self._num)

    def forget(self, req_id: str) -> None:
        self._requests.pop(req_id, None)
        if self._ngrams is not None:
            self._ngrams.forget(req_id)

    def _settled(self, request: DraftRequest) -> _Request:
        """The state of a request, which has learned what became of its last drafts."""
        state = self._requests[request.req_id]
        assert state.end == len(request.token_ids) - 1, (state.end, len(request.token_ids))
        state.expectations.settle(request.token_ids[state.num_tokens :].tolist())
        state.num_tokens = len(request.token_ids)
        return state

    def _prospect(self, request: DraftRequest, draft: Candidates) -> Prospect:
        """What the heads may bring beside a draft of n-grams: they run one row of the request."""
        known, most = sum(draft.probs), min(self.num_heads, request.max_depth)
        return Prospect(
            known, max(known, most), request.min_prob, request.token_ms, num_known=1, num_nodes=0
        )

    def _grow(self, request: DraftRequest, levels: Sequence[Mapping[int, float]]) -> Candidates:
        """The tree of one request. levels: by head, the probabilities of its best tokens."""

        def drafted(path: Path) -> Mapping[int, float]:
            return levels[len(path)] if len(path) < len(levels) else {}

        votes = None if self._ngrams is None else self._ngrams.votes(request)
        expectations = self._requests[request.req_id].expectations
        sources = Sources({"medusa": drafted}, votes, self._cells, expectations)
        bounds = request.max_nodes, request.max_depth, request.min_prob
        return grow(sources.expand, *bounds, self.paths(request))


def _levels(tokens: list[list[int]], logprobs: list[list[float]]) -> list[dict[int, float]]:
    """Token -> probability of each head."""
    probs = [[exp(logprob) for logprob in row] for row in logprobs]
    return [
        {token: prob for token, prob in zip(*row, strict=True) if prob > 0}
        for row in zip(tokens, probs, strict=True)
    ]
