"""Drafts level by level: MTP modules, EAGLE's heads and draft models.

In multi-token prediction module k drafts depth k from the hidden states of the depth above.

Module k takes, at position t, a hidden state of t (the target's for module 1, else module k-1's or
the target's) and token t+k, and predicts token t+k+1 (DeepSeek-V3, 2024, arXiv 2412.19437). Each
module attends to keys and values of its own, in which a row is final once token t+k is committed;
before that its row is drafted anew every round. So a level is one forward pass over

    the committed rows that its module has not seen yet, then the nodes of the draft so far

(of many such rows, as of a long prompt, the last: see `MAX_CAUGHT_UP`), and what follows the
deepest nodes are the candidates of the next level. A module that drafts all levels alone keeps
token t+1 at position t in all of them, so its committed rows are those of the first level. The best
candidates are continued (EAGLE-2, Li et al. 2024, arXiv 2406.16858); in a chain it is one.

EAGLE (Li et al. 2024, arXiv 2401.15077) and EAGLE-3 (2025, arXiv 2503.01840) are one such module;
the hidden states that EAGLE-3 starts from are those of several layers of the target. A draft model
reads none: it keeps token t at position t, so that its committed rows reach up to the last token.

n-gram matches may join as a second source: a token that both propose is one
candidate, and what each source and their agreement are worth is learned online.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from vllm_specplus.config import SpecPlusConfig
from vllm_specplus.core.growth import MAX_FRONTIER, NUM_CHILDREN, Candidates, Path, grow
from vllm_specplus.proposers.base import DraftRequest, Proposer
from vllm_specplus.proposers.calibration import Expectations
from vllm_specplus.proposers.level_gate import LevelGate, Prospect
from vllm_specplus.proposers.levels import MAX_LEVEL_NODES, DraftModel, HiddenStates, RequestRows
from vllm_specplus.proposers.ngram import NgramProposer, Votes
from vllm_specplus.proposers.registry import register
from vllm_specplus.proposers.sources import SourceCells, Sources

MAX_CAUGHT_UP = 192
"""Committed rows of a request that a module may catch up with; if it has missed more, it begins
anew from the last of them. A module of one layer drafts from little context: with MTP heads for
Gemma-3-270M behind prompts of 538 to 1513 tokens, 64 of them did as well as all."""
LEAST_CAUGHT_UP = 64
"""How many it begins anew with; the rest of a block comes on top."""
MODELS = ("draft", "eagle", "eagle3", "mtp", "mtp3")
"""The methods that draft level by level."""


@dataclass(slots=True)
class _Request:
    """What is remembered of one request from step to step.

    end: position behind the last one whose hidden state has come. firsts: per cache, the first slot
    that its module sees. starts: per cache, the first position that its module has not seen.
    inputs: per cache, hidden states from there on. block_size: the model's.
    """

    block_size: int
    end: int
    firsts: list[int]
    starts: list[int]
    inputs: list[list[torch.Tensor]]
    num_tokens: int = 0
    expectations: Expectations = field(default_factory=Expectations)

    def cache(self, level: int) -> int:
        """The cache, from 0 on, that a level keeps its rows in."""
        return min(level, len(self.starts) - 1)

    def forget_missed(self, cache: int, end: int) -> None:
        """Has a module that has missed many rows up to `end` begin anew, in the block of one of the
        last of them, and with it the modules behind, which have missed more."""
        first = (end - LEAST_CAUGHT_UP) // self.block_size * self.block_size
        if end - self.starts[cache] <= MAX_CAUGHT_UP or first <= self.starts[cache]:
            return
        for each in range(cache, len(self.starts)):
            num_rows = first - self.starts[each]
            self.firsts[each] = self.starts[each] = first
            if self.inputs[each]:
                self.inputs[each] = [torch.cat(self.inputs[each])[num_rows:].clone()]


class _Draft:
    """One request's tree while it grows."""

    def __init__(
        self,
        request: DraftRequest,
        state: _Request,
        cells: SourceCells,
        votes: Votes | None,
        paths: Collection[Path] | None,
        hidden_state_from: HiddenStates,
    ) -> None:
        self.request, self.state = request, state
        self.nodes: list[Path] = []
        self.frontier: dict[Path, float] = {(): 1.0}
        self._paths, self._reads = paths, hidden_state_from
        self._drafted: dict[Path, dict[int, float]] = {}
        self._sources = Sources({"model": self.after}, votes, cells, state.expectations)
        self._hidden_states: dict[Path, torch.Tensor] = {}

    def after(self, path: Path) -> dict[int, float]:
        """What the model drafted after a path: token -> probability."""
        return self._drafted.get(path, {})

    def wants(self, level: int) -> bool:
        """Whether a level can be drafted: its committed rows must reach up to the nodes, and have
        KV slots, which the last token may not have yet."""
        start, end = self.state.starts[self.state.cache(level)], self._end(level)
        allowed = level < self.request.max_depth and start <= end <= self.request.num_slots
        return allowed and bool(self.frontier)

    def _ahead(self, level: int) -> int:
        """How many positions the token of a row is ahead of the row."""
        return 0 if self._reads is None else self.state.cache(level) + 1

    def _end(self, level: int) -> int:
        """The position behind the committed rows of a level."""
        return len(self.request.token_ids) - self._ahead(level)

    def rows(self, level: int) -> RequestRows:
        """What the module of `level` is to run for this request."""
        start = self.state.starts[self.state.cache(level)]
        num_known = self._end(level) - start
        known_tokens = self.request.token_ids[start + self._ahead(level) :].tolist()
        row_of = {path: row for row, path in enumerate(self.nodes)}
        return RequestRows(
            index=self.request.index,
            start=start,
            num_known=num_known,
            tokens=[*known_tokens, *(path[-1] for path in self.nodes)],
            parents=[row_of.get(path[:-1], -1) for path in self.nodes],
            depths=[len(path) for path in self.nodes],
            hidden_states=self._inputs(level, num_known),
            first=self.state.firsts[self.state.cache(level)],
        )

    def _inputs(self, level: int, num_known: int) -> torch.Tensor:
        """The hidden states that the rows of a level take, [num_rows, state_size]."""
        if self._reads is None:
            return torch.empty(num_known + len(self.nodes), 0)
        inputs = torch.cat(self.state.inputs[self.state.cache(level)])
        above = [self._above(path, inputs[num_known:]) for path in self.nodes]
        return torch.cat([inputs[:num_known], *above])

    def _above(self, path: Path, inputs: torch.Tensor) -> torch.Tensor:
        """The hidden state that a node's row takes, [1, state_size]."""
        if self._reads == "previous":
            return self._hidden_states[path[:-1]][None]
        return inputs[len(path) - 1 : len(path)]

    def advance(
        self, level: int, num_known: int, last: torch.Tensor, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """Takes what a level returned of its rows; returns the rows of `last` of the frontier."""
        state, cache = self.state, self.state.cache(level)
        state.starts[cache] += num_known
        if self._reads is not None:
            state.inputs[cache] = [torch.cat(state.inputs[cache])[num_known:].clone()]
        if self._reads == "previous" and cache + 1 < len(state.inputs):
            state.inputs[cache + 1].append(hidden_states[:num_known].clone())
            state.forget_missed(cache + 1, state.starts[cache])
        root = hidden_states[num_known - 1] if num_known else self._hidden_states[()]
        nodes = zip(self.nodes, hidden_states[num_known:], strict=True)
        self._hidden_states = {(): root, **dict(nodes)}
        row_of = {(): num_known - 1} | {p: num_known + row for row, p in enumerate(self.nodes)}
        return last[[row_of[path] for path in self.frontier]]

    def branch(self, level: int, children: Sequence[dict[int, float]]) -> None:
        """Takes what follows each node of the frontier, and picks the next one: below nodes that
        have run, as n-grams may go on after others."""
        self._drafted.update(zip(self.frontier, children, strict=True))
        depth = level + 1
        room = min(self.request.num_slots - self._end(depth), MAX_LEVEL_NODES)
        before, nodes = self.frontier, dict[Path, None]()
        self.frontier = {}
        grown = self.grow(depth)
        for path, prob in zip(grown.paths(), grown.probs, strict=True):
            reached = len(path) == depth and path[:-1] in before
            if reached and len(self.frontier) < MAX_FRONTIER:
                missing = [path[:d] for d in range(1, depth + 1) if path[:d] not in nodes]
                if len(nodes) + len(missing) <= room:
                    self.frontier[path] = prob
                    nodes.update(dict.fromkeys(missing))
        self.nodes = list(nodes)

    def prospect(self, level: int) -> Prospect:
        """What a level may bring."""
        request, known = self.request, 0.0
        for path, prob in self.frontier.items():
            matches = (p * prob for p in self._sources.matches(path).values())
            known += sum(p for p in matches if p >= request.min_prob)
        most = max(known, sum(self.frontier.values()))
        num_known = self._end(level) - self.state.starts[self.state.cache(level)]
        return Prospect(known, most, request.min_prob, request.token_ms, num_known, len(self.nodes))

    def gain(self, level: int, nodes: Mapping[Path, float]) -> float:
        """The expected tokens that a level added to `nodes`, of which n-grams knew a part."""
        return sum(
            prob - nodes.get(path[:-1], 1.0) * self._sources.matches(path[:-1]).get(path[-1], 0.0)
            for path, prob in nodes.items()
            if len(path) == level + 1 and path[-1] in self.after(path[:-1])
        )

    def grow(self, max_depth: int) -> Candidates:
        """The best nodes down to a depth."""
        request = self.request
        depth = min(max_depth, request.max_depth)
        return grow(self._sources.expand, request.max_nodes, depth, request.min_prob, self._paths)


@dataclass(frozen=True, slots=True)
class _Level:
    """A level that was drafted, for which of the drafts, and in how many milliseconds."""

    number: int
    drafts: Sequence[_Draft]
    prospects: Sequence[Prospect]
    ms: float


@register(*MODELS, *(f"{name}+ngram" for name in MODELS))
class LevelProposer(Proposer):
    """Chains and trees of what drafts level by level, with n-gram matches where they are asked for.

    drafter: the method and its path, None for the target's own modules. model: what runs it; the
    engine sets it when it has loaded the target.
    """

    model: DraftModel

    def __init__(self, config: SpecPlusConfig) -> None:
        super().__init__(config)
        self.drafter = next(spec for spec in config.methods if spec.name in MODELS)
        self._ngrams = NgramProposer(config) if len(config.methods) > 1 else None
        self._cells = SourceCells()
        self._gate = LevelGate(config.num_speculative_tokens)
        self._requests: dict[str, _Request] = {}
        self._drafts: list[_Draft] = []
        self._levels: list[_Level] = []

    def num_levels(self, num_modules: int) -> int:
        """How deep heads of so many modules draft: [mtp3] runs the last of fewer than three again,
        and what is deeper is left to n-grams."""
        most = max(num_modules, 3) if self.drafter.name == "mtp3" else num_modules
        return min(most, self.config.num_speculative_tokens)

    def measure_levels(self, target: Callable[[], object], most: int, dtype: torch.dtype) -> None:
        """Times a level at several numbers of rows, in KV slots of the batch's row 0: before it is
        in use.

        target: runs the target, whose weights have then been in the caches last, as in a step.
        most: rows to time. dtype: of hidden states.
        """
        hidden_states = torch.zeros(most, self.model.state_size, dtype=dtype)

        def draft(num_rows: int) -> None:
            states = hidden_states[:num_rows]
            rows = RequestRows(0, 0, num_rows, [0] * num_rows, [], [], states)
            last, _ = self.model.forward(0, [rows])
            self.model.best_tokens(0, last[:MAX_FRONTIER], NUM_CHILDREN)

        self._gate.measure(draft, most, target)

    def absorb(self, req_id: str, start: int, hidden_states: torch.Tensor) -> None:
        # Where a request starts behind cached blocks, a draft model sees the keys and values that
        # an earlier request left there. Those of the last positions may be of another continuation,
        # or may never have been written: drafts can be worse at the seam, the text cannot. Modules,
        # which may have left out whole blocks, see none before that of `start`.
        model, state = self.model, self._requests.get(req_id)
        caches, reads = model.num_caches, model.hidden_state_from
        if state is None or state.end != start:
            size, inputs = model.block_size, [list[torch.Tensor]() for _ in range(caches)]
            first = 0 if reads is None else start // size * size
            state = _Request(size, start, [first] * caches, [start] * caches, inputs)
            self._requests[req_id] = state
        state.end += len(hidden_states)
        takers = {None: 0, "previous": 1, "target": caches}[reads]
        if takers:
            kept = hidden_states.clone()
            for of_cache in state.inputs[:takers]:
                of_cache.append(kept)
            for cache in range(takers):
                state.forget_missed(cache, state.end)

    def propose(self, requests: Sequence[DraftRequest]) -> list[Candidates]:
        depth = self.config.num_speculative_tokens
        return [draft.grow(depth) for draft in self.draft(requests)]

    def granted(self, drafts: Sequence[Candidates]) -> None:
        self.learn([draft.by_path() for draft in drafts])

    def learn(self, granted: Sequence[Mapping[Path, float]]) -> None:
        """Learns what the levels of the last drafts were worth. granted: of each draft, path ->
        probability of the nodes that got rows."""
        nodes = dict(zip(self._drafts, granted, strict=True))
        for level in self._levels:
            gains = [draft.gain(level.number, nodes[draft]) for draft in level.drafts]
            self._gate.observe(level.number, level.prospects, gains, level.ms)
        self._drafts, self._levels = [], []

    def draft(self, requests: Sequence[DraftRequest]) -> list[_Draft]:
        """The trees of the requests, as deep as is worth it."""
        self._drafts, self._levels = [self._open(request) for request in requests], []
        for level in range(self.model.num_levels):
            going = [draft for draft in self._drafts if draft.wants(level)]
            if not going or not self._draft_level(level, going):
                break
        return self._drafts

    def forget(self, req_id: str) -> None:
        self._requests.pop(req_id, None)
        if self._ngrams is not None:
            self._ngrams.forget(req_id)

    def _open(self, request: DraftRequest) -> _Draft:
        state = self._requests[request.req_id]
        state.expectations.settle(request.token_ids[state.num_tokens :].tolist())
        state.num_tokens = len(request.token_ids)
        votes = None if self._ngrams is None else self._ngrams.votes(request)
        reads = self.model.hidden_state_from
        return _Draft(request, state, self._cells, votes, self.paths(request), reads)

    def _draft_level(self, level: int, drafts: Sequence[_Draft]) -> bool:
        """Adds a level to the drafts, unless it is not worth its time."""
        began, prospects = time.perf_counter(), [draft.prospect(level) for draft in drafts]
        if not self._gate.opens(level, prospects):
            return False
        rows = [draft.rows(level) for draft in drafts]
        lens = [len(each) for each in rows]
        states = zip(*(part.split(lens) for part in self.model.forward(level, rows)), strict=True)
        frontiers = [
            draft.advance(level, each.num_known, *of_rows)
            for draft, each, of_rows in zip(drafts, rows, states, strict=True)
        ]
        children = iter(self.model.best_tokens(level, torch.cat(frontiers), NUM_CHILDREN))
        for draft, frontier in zip(drafts, frontiers, strict=True):
            draft.branch(level, [next(children) for _ in frontier])
        ms = 1e3 * (time.perf_counter() - began)
        self._levels.append(_Level(level, drafts, prospects, ms))
        return True
