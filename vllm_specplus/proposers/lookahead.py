"""Lookahead decoding: the target makes n-grams itself, beside its own text, and tries them later.

(Fu et al. 2024, arXiv 2402.02057.) A step verifies a tree of two kinds of nodes: candidates, which
are n-grams of the pool that begin with the root, and the Jacobi window (lookahead_window.py), of
which the target's token after every column is wanted whether it is accepted or not. As the window's
rows see just their ancestors and stand at their depth, they are nodes like others: one that happens
to be right is accepted, and one that is a candidate too is there once.

A row of the window pays later, if at all. What it is worth is learned: tokens accepted that no
other source proposed, by rows spent. At that value it competes with candidates for the row budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from math import log

from vllm_specplus.config import SpecPlusConfig
from vllm_specplus.core.growth import Candidates, Path, grow, rank
from vllm_specplus.core.tree import Tree
from vllm_specplus.proposers.base import DraftRequest, Proposer
from vllm_specplus.proposers.calibration import MAX_PROB, Cell, Expectations
from vllm_specplus.proposers.lookahead_window import Pool, Window
from vllm_specplus.proposers.ngram import NgramProposer
from vllm_specplus.proposers.registry import register

_FIRST, _LATER, _PER_RANK = 0.4, 0.7, 0.5
"""Priors: the latest n-gram's next token is right, its further ones are if those before were, and
each earlier n-gram is half as likely. About what Gemma-3-270M did on Spec-Bench, greedy."""


class PoolCells:
    """How often the pool's n-grams were right, by depth and by how late they came."""

    def __init__(self) -> None:
        self._cells: dict[tuple[bool, int, int], Cell] = {}

    def estimate(self, given: bool, depth: int, rank: int) -> tuple[float, Cell, float]:
        """(probability, cell to tell the outcome to, prior) of a token."""
        prior = (_LATER if depth else _FIRST) * _PER_RANK**rank
        cell = self._cells.setdefault((given, depth, rank), Cell())
        return min(prior * cell.hits / cell.expected, MAX_PROB), cell, prior


class WindowWorth:
    """Tokens that a row of the window brings in the end; starts as if it had seen 300 rows.

    While no row is granted it is thought a little better of, up to what it started with, so that
    the window is tried again.
    """

    START_ROWS, START_VALUE = 300.0, 0.2
    FORGET = 0.02
    CURIOSITY = 2e-4
    LEAST = 1e-3

    def __init__(self) -> None:
        self._rows = self.START_ROWS
        self._tokens = self.START_ROWS * self.START_VALUE

    @property
    def value(self) -> float:
        return min(max(self._tokens / self._rows, self.LEAST), MAX_PROB)

    def observe(self, num_tokens: int, num_rows: int) -> None:
        """A round accepted so many tokens that the window had found, and spent so many rows."""
        kept = 1 - self.FORGET if num_rows else 1.0
        self._tokens = kept * self._tokens + num_tokens
        self._rows = kept * self._rows + num_rows
        if not num_rows:
            better = self._tokens * (1 + self.CURIOSITY)
            self._tokens = max(self._tokens, min(better, self._rows * self.START_VALUE))


@dataclass(slots=True)
class _Request:
    """What is remembered of one request from step to step.

    columns: of the window in the tree that is being verified. made: the paths in it that
    are a merit of the window, now or before. own_rows: those that only the window has asked for.
    """

    window: Window
    pool: Pool
    expectations: Expectations = field(default_factory=Expectations)
    columns: list[Path] = field(default_factory=list)
    made: set[Path] = field(default_factory=set)
    own_rows: set[Path] = field(default_factory=set)


@register("lookahead", "lookahead+ngram")
class LookaheadProposer(Proposer):
    """Trees of n-grams that the target has made, and the window that makes them."""

    def __init__(self, config: SpecPlusConfig) -> None:
        super().__init__(config)
        self._cells = PoolCells()
        self._worth = WindowWorth()
        self._requests: dict[str, _Request] = {}
        others = [spec for spec in config.methods if spec.name == "ngram"]
        self._ngrams = NgramProposer(config) if others else None

    def propose(self, requests: Sequence[DraftRequest]) -> list[Candidates]:
        found = [Candidates()] * len(requests)
        if self._ngrams is not None:
            found = self._ngrams.propose(requests)
        return [self._propose(*pair) for pair in zip(requests, found, strict=True)]

    def observe(
        self, req_id: str, tree: Tree, accepted_rows: Sequence[int], row_tokens: Sequence[int]
    ) -> None:
        state = self._requests.get(req_id)
        if state is None:
            return
        paths: list[Path] = [(), *Candidates(tree.tokens, tree.parents).paths()]
        emitted = [row_tokens[row] for row in (0, *accepted_rows)]
        state.expectations.settle(emitted)
        found = sum(paths[row] in state.made for row in accepted_rows)
        self._worth.observe(found, sum(path in state.own_rows for path in paths))
        rows = {path: row for row, path in enumerate(paths)}
        there = takewhile(rows.__contains__, state.columns)
        tokens = [row_tokens[rows[path]] for path in there]
        if tokens:  # else it stays: moved on with undrafted text it brought no more, no less
            for ngram in state.window.advance(tokens, len(emitted)):
                state.pool.add(ngram, given=False)
        state.columns = []

    def forget(self, req_id: str) -> None:
        self._requests.pop(req_id, None)
        if self._ngrams is not None:
            self._ngrams.forget(req_id)

    def _open(self, request: DraftRequest) -> _Request:
        """The request's state; a new one has the n-grams of the prompt."""
        if request.req_id in self._requests:
            return self._requests[request.req_id]
        config, length = self.config, self.config.lookahead_ngram
        pool = Pool(config.lookahead_candidates)
        start = max(len(request.token_ids) - config.lookahead_prompt_tokens, 0)
        text = request.token_ids[start:].tolist()
        for first in range(len(text) - length + 1):
            pool.add(tuple(text[first : first + length]), given=True)
        state = _Request(Window(config.lookahead_window, length), pool)
        return self._requests.setdefault(request.req_id, state)

    def _propose(self, request: DraftRequest, ngrams: Candidates) -> Candidates:
        state = self._open(request)
        given: set[Path] = set()

        def expand(path: Path) -> Iterator[tuple[int, float]]:
            children: dict[int, bool] = {}
            for rest, from_prompt in state.pool.after(root):
                if rest[: len(path)] == path and len(rest) > len(path):
                    token = rest[len(path)]
                    children[token] = children.get(token, False) or from_prompt
            expected = state.expectations.at(path)
            for order, (token, from_prompt) in enumerate(children.items()):
                prob, cell, prior = self._cells.estimate(from_prompt, len(path), order)
                expected[token] = cell, prior
                if from_prompt:
                    given.add((*path, token))
                yield token, log(prob)

        root = int(request.token_ids[-1])
        bounds = request.max_nodes, request.max_depth, request.min_prob, self.paths(request)
        probs: dict[Path, float] = {}
        for part in (grow(expand, *bounds), ngrams):
            for path, prob in zip(part.paths(), part.probs, strict=True):
                probs[path] = max(prob, probs.get(path, 0.0))
        self._add_window(request, state, probs)
        state.made = probs.keys() - given - set(ngrams.paths())
        return rank(probs, request.max_nodes)

    def _add_window(self, request: DraftRequest, state: _Request, probs: dict[Path, float]) -> None:
        """Puts the window's rows among the candidates, at what a row is worth."""
        worth, others = self._worth.value, set(probs)
        state.columns = []
        if worth >= request.min_prob and not request.chain_only:
            columns = state.window.columns(request.token_ids)
            state.columns = [path for path in columns if len(path) <= request.max_depth]
        for path in state.columns:
            for end in range(1, len(path) + 1):
                probs[path[:end]] = max(worth, probs.get(path[:end], 0.0))
        state.own_rows = probs.keys() - others
