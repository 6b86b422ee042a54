"""Multi-token prediction: module k drafts depth k from the hidden states of the depth above.

Module k takes, at position t, a hidden state of t (the target's for module 1, else module k-1's or
the target's) and token t+k, and predicts token t+k+1 (DeepSeek-V3, 2024, arXiv 2412.19437). Each
module attends to keys and values of its own, in which a row is final once token t+k is committed;
before that its row is drafted anew every round. So a level is one forward pass over

    the committed rows that its module has not seen yet, then the nodes of the draft so far,

and what follows the deepest nodes are the candidates of the next level. A module that drafts all
levels alone keeps token t+1 at position t in all of them, so its committed rows are those of the
first level. The best candidates are continued (EAGLE-2, Li et al. 2024, arXiv 2406.16858); in a
chain it is one. n-gram matches may join as a second source: a token that both propose is one
candidate, and what each source and their agreement are worth is learned online.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch

from vllm_specplus.config import SpecPlusConfig
from vllm_specplus.core.cost import CostModel, fastest
from vllm_specplus.core.growth import MAX_FRONTIER, NUM_CHILDREN, Candidates, Path, grow
from vllm_specplus.proposers.base import DraftRequest, Proposer
from vllm_specplus.proposers.calibration import Expectations
from vllm_specplus.proposers.level_gate import LevelGate, Prospect
from vllm_specplus.proposers.levels import MAX_NODES, DraftModel, RequestRows
from vllm_specplus.proposers.ngram import NgramProposer, Votes
from vllm_specplus.proposers.registry import register
from vllm_specplus.proposers.sources import SourceCells, Sources


@dataclass(slots=True)
class _Request:
    """What is remembered of one request from step to step.

    end: position behind the last one whose hidden state has come. starts: per cache, the first
    position that its module has not seen. inputs: per cache, hidden states from there on.
    """

    end: int
    starts: list[int]
    inputs: list[list[torch.Tensor]]
    num_tokens: int = 0
    expectations: Expectations = field(default_factory=Expectations)

    def cache(self, level: int) -> int:
        """The cache, from 0 on, that a level keeps its rows in."""
        return min(level, len(self.starts) - 1)


class _Draft:
    """One request's tree while it grows."""

    def __init__(
        self,
        request: DraftRequest,
        state: _Request,
        cells: SourceCells,
        votes: Votes | None,
        paths: Collection[Path] | None,
        chained: bool,
    ) -> None:
        self.request, self.state = request, state
        self.nodes: list[Path] = []
        self.level_tokens = 0.0
        self.frontier: dict[Path, float] = {(): 1.0}
        self._paths, self._chained = paths, chained
        self._drafted: dict[Path, dict[int, float]] = {}
        self._sources = Sources("mtp", self._after, votes, cells, state.expectations)
        self._hidden_states: dict[Path, torch.Tensor] = {}

    def _after(self, path: Path) -> dict[int, float]:
        return self._drafted.get(path, {})

    def wants(self, level: int) -> bool:
        """Whether a level can be drafted: its committed rows must reach up to the nodes."""
        start = self.state.starts[self.state.cache(level)]
        allowed = level < self.request.max_depth and start <= self._end(level)
        return allowed and bool(self.frontier)

    def _end(self, level: int) -> int:
        """The position behind the committed rows of a level."""
        return len(self.request.token_ids) - self.state.cache(level) - 1

    def rows(self, level: int) -> RequestRows:
        """What the module of `level` is to run for this request."""
        cache = self.state.cache(level)
        start, inputs = self.state.starts[cache], torch.cat(self.state.inputs[cache])
        num_known = self._end(level) - start
        known_tokens = self.request.token_ids[start + cache + 1 :].tolist()
        row_of = {path: row for row, path in enumerate(self.nodes)}
        above = [self._above(path, inputs[num_known:]) for path in self.nodes]
        return RequestRows(
            index=self.request.index,
            start=start,
            num_known=num_known,
            tokens=[*known_tokens, *(path[-1] for path in self.nodes)],
            parents=[row_of.get(path[:-1], -1) for path in self.nodes],
            depths=[len(path) for path in self.nodes],
            hidden_states=torch.cat([inputs[:num_known], *above]),
        )

    def _above(self, path: Path, inputs: torch.Tensor) -> torch.Tensor:
        """The hidden state that a node's row takes, [1, hidden_size]."""
        if self._chained:
            return self._hidden_states[path[:-1]][None]
        return inputs[len(path) - 1 : len(path)]

    def advance(self, level: int, num_known: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """Takes a level's hidden states, returns those of the frontier: [width, hidden_size]."""
        state, cache = self.state, self.state.cache(level)
        state.starts[cache] += num_known
        state.inputs[cache] = [torch.cat(state.inputs[cache])[num_known:].clone()]
        if self._chained and cache + 1 < len(state.inputs):
            state.inputs[cache + 1].append(hidden_states[:num_known].clone())
        root = hidden_states[num_known - 1] if num_known else self._hidden_states[()]
        nodes = zip(self.nodes, hidden_states[num_known:], strict=True)
        self._hidden_states = {(): root, **dict(nodes)}
        return torch.stack([self._hidden_states[path] for path in self.frontier])

    def branch(self, level: int, children: Sequence[dict[int, float]]) -> None:
        """Takes what follows each node of the frontier, and picks the next one: below nodes that
        have run, as n-grams may go on after others."""
        self._drafted.update(zip(self.frontier, children, strict=True))
        depth = level + 1
        room = min(self.request.num_slots - self._end(depth), MAX_NODES)
        before, nodes = self.frontier, dict[Path, None]()
        self.frontier, self.level_tokens = {}, 0.0
        grown = self.grow(depth)
        for path, prob in zip(grown.paths(), grown.probs, strict=True):
            if len(path) < depth:
                continue
            self.level_tokens += prob
            if len(self.frontier) < MAX_FRONTIER and path[:-1] in before:
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

    def grow(self, max_depth: int) -> Candidates:
        """The best nodes down to a depth."""
        request = self.request
        depth = min(max_depth, request.max_depth)
        return grow(self._sources.expand, request.max_nodes, depth, request.min_prob, self._paths)


@register("mtp", "mtp3", "mtp+ngram", "mtp3+ngram")
class MtpProposer(Proposer):
    """Chains and trees of MTP modules, with n-gram matches where they are asked for.

    path: of the heads checkpoint, None for the target's own modules. model: what runs the modules;
    the engine sets it when it has loaded the target.
    """

    model: DraftModel

    def __init__(self, config: SpecPlusConfig) -> None:
        super().__init__(config)
        models = {spec.name: spec.model for spec in config.methods}
        self.path = next(path for name, path in models.items() if name != "ngram")
        self._ngrams = NgramProposer(config) if "ngram" in models else None
        self._cells = SourceCells()
        self._gate = LevelGate(config.num_speculative_tokens)
        self._requests: dict[str, _Request] = {}

    def num_levels(self, num_modules: int) -> int:
        """How deep heads of so many modules draft: [mtp3] runs the last of fewer than three again,
        and what is deeper is left to n-grams."""
        most = max(num_modules, 3) if "mtp3" in self.config.method else num_modules
        return min(most, self.config.num_speculative_tokens)

    def measure_levels(self, target: Callable[[], object], hidden_states: torch.Tensor) -> None:
        """Times a level at several numbers of rows, in KV slots of the batch's row 0: before it is
        in use.

        target: runs the target, whose weights have then been in the caches last, as in a step.
        hidden_states: [most rows to time, hidden_size], any.
        """

        def level_ms(num_rows: int) -> float:
            target()
            began, states = time.perf_counter(), hidden_states[:num_rows]
            rows = RequestRows(0, 0, num_rows, [0] * num_rows, [], [], states)
            frontier = self.model.forward(0, [rows])[:MAX_FRONTIER]
            self.model.best_tokens(0, frontier, NUM_CHILDREN)
            return 1e3 * (time.perf_counter() - began)

        most = len(hidden_states)
        points = sorted({1, min(MAX_FRONTIER, most), most})
        self._gate.cost = CostModel(fastest(level_ms, points))

    def absorb(self, req_id: str, start: int, hidden_states: torch.Tensor) -> None:
        # Where a request starts behind cached blocks, the modules see the keys and values that an
        # earlier request left there. Those of the last positions may be of another continuation,
        # or may never have been written: drafts can be worse at the seam, the text cannot.
        caches, state = self.model.num_caches, self._requests.get(req_id)
        if state is None or state.end != start:
            state = _Request(start, [start] * caches, [[] for _ in range(caches)])
            self._requests[req_id] = state
        state.end += len(hidden_states)
        kept = hidden_states.clone()
        for inputs in state.inputs[: 1 if self._chained else caches]:
            inputs.append(kept)

    def propose(self, requests: Sequence[DraftRequest]) -> list[Candidates]:
        drafts = [self._open(request) for request in requests]
        for level in range(self.model.num_levels):
            going = [draft for draft in drafts if draft.wants(level)]
            if not going or not self._draft_level(level, going):
                break
        return [draft.grow(self.config.num_speculative_tokens) for draft in drafts]

    def forget(self, req_id: str) -> None:
        self._requests.pop(req_id, None)
        if self._ngrams is not None:
            self._ngrams.forget(req_id)

    @property
    def _chained(self) -> bool:
        return self.model.hidden_state_from == "previous"

    def _open(self, request: DraftRequest) -> _Draft:
        state = self._requests[request.req_id]
        state.expectations.settle(request.token_ids[state.num_tokens :].tolist())
        state.num_tokens = len(request.token_ids)
        votes = None if self._ngrams is None else self._ngrams.votes(request)
        return _Draft(request, state, self._cells, votes, self.paths(request), self._chained)

    def _draft_level(self, level: int, drafts: Sequence[_Draft]) -> bool:
        """Adds a level to the drafts, unless it is not worth its time."""
        began, prospects = time.perf_counter(), [draft.prospect(level) for draft in drafts]
        if not self._gate.opens(level, prospects):
            return False
        rows = [draft.rows(level) for draft in drafts]
        hidden_states = self.model.forward(level, rows).split([len(each) for each in rows])
        frontiers = [
            draft.advance(level, each.num_known, hidden)
            for draft, each, hidden in zip(drafts, rows, hidden_states, strict=True)
        ]
        children = iter(self.model.best_tokens(level, torch.cat(frontiers), NUM_CHILDREN))
        for draft, frontier in zip(drafts, frontiers, strict=True):
            draft.branch(level, [next(children) for _ in frontier])
        tokens = [draft.level_tokens for draft in drafts]
        self._gate.observe(level, prospects, tokens, 1e3 * (time.perf_counter() - began))
        return True
