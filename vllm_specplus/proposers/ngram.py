"""n-gram trees: what followed earlier occurrences of the last tokens, merged and ranked.

Prompt lookup (Saxena 2023) proposes the continuation of one match. Here all earlier occurrences
vote: one weighs 2 to the power of its match length, and the share of the votes for a token, with
the length of the longest match, tells how likely the target samples it. Down the tree these
probabilities multiply, and the matches that were followed grow by one token per level.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import log

import numpy as np

from vllm_specplus.config import SpecPlusConfig
from vllm_specplus.core.growth import Candidates, Path, grow
from vllm_specplus.proposers.base import DraftRequest, Proposer
from vllm_specplus.proposers.calibration import Calibration, Expectations
from vllm_specplus.proposers.ngram_index import LONGEST_MATCH, NgramIndex
from vllm_specplus.proposers.registry import register

MAX_OCCURRENCES = 16
"""Matches that vote in a step; 8 to 64 were replayed and did alike."""

Voter = tuple[int, int, Sequence[int]]
"""Match length, weight and what followed the match."""


class Votes:
    """`expand` for `grow`, which notes its estimates to learn from them later."""

    def __init__(
        self, calibration: Calibration, voters: Sequence[Voter], expectations: Expectations
    ) -> None:
        self._expectations = expectations
        self._calibration = calibration
        self._voters: dict[Path, Sequence[Voter]] = {(): voters}

    def __call__(self, path: Path) -> Iterator[tuple[int, float]]:
        depth = len(path)
        voters = self._voters.pop(path)
        by_token: dict[int, list[Voter]] = {}
        for voter in voters:
            token = voter[2][depth]
            by_token.setdefault(path[~token] if token < 0 else token, []).append(voter)
        longest = max(voters)[0]
        length = min(longest + depth, LONGEST_MATCH)
        total = (1 << longest) + sum(weight for _, weight, _ in voters)
        expected = self._expectations.at(path)
        for token, chosen in by_token.items():
            share = sum(weight for _, weight, _ in chosen) / total
            prob, cell, prior = self._calibration.estimate(length, share)
            expected[token] = cell, prior
            self._voters[(*path, token)] = chosen
            yield token, log(prob)


class _RequestState:
    """What is remembered of one request from step to step."""

    def __init__(self, config: SpecPlusConfig) -> None:
        self.index = NgramIndex(config.ngram_prompt_lookup_min, config.ngram_prompt_lookup_max)
        self.expectations = Expectations()

    def update(self, token_ids: np.ndarray) -> None:
        """Takes in what was appended, and learns from what had been expected there."""
        self.expectations.settle(self.index.update(token_ids))

    def voters(self, depth: int) -> list[Voter]:
        """Earlier matches and the `depth` tokens after each, alike continuations merged.

        Beyond the sequence's end a match is followed by the draft itself: ~i stands for the token
        drafted at depth i, so text that repeats itself is continued to any depth.
        """
        tokens = self.index.tokens
        merged: dict[tuple[int, ...], tuple[int, int]] = {}
        for position, length in self.index.matches(MAX_OCCURRENCES):
            known = tokens[position + 1 : position + 1 + depth]
            follow = (*known, *range(-1, len(known) - depth - 1, -1))
            longest, weight = merged.get(follow, (0, 0))
            merged[follow] = max(longest, length), weight + (1 << length)
        return [(length, weight, follow) for follow, (length, weight) in merged.items()]


@register("ngram")
class NgramProposer(Proposer):
    """Trees of n-gram matches in each request's own prompt and output."""

    def __init__(self, config: SpecPlusConfig) -> None:
        super().__init__(config)
        self._calibration = Calibration()
        self._requests: dict[str, _RequestState] = {}

    def propose(self, requests: Sequence[DraftRequest]) -> list[Candidates]:
        return [self._propose(request) for request in requests]

    def forget(self, req_id: str) -> None:
        self._requests.pop(req_id, None)

    def votes(self, request: DraftRequest) -> Votes | None:
        """Takes in what was appended, and what earlier matches say comes next; None for nothing."""
        state = self._requests.get(request.req_id)
        if state is None:
            state = self._requests[request.req_id] = _RequestState(self.config)
        state.update(request.token_ids)
        voters = state.voters(request.max_depth)
        return Votes(self._calibration, voters, state.expectations) if voters else None

    def _propose(self, request: DraftRequest) -> Candidates:
        votes = self.votes(request)
        if votes is None:
            return Candidates()
        return grow(
            votes, request.max_nodes, request.max_depth, request.min_prob, self.paths(request)
        )
