"""A proposer for tests, and a probe that shows what a round did."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from tests.engine.models import VOCAB_SIZE
from vllm_specplus.config import SpecPlusConfig
from vllm_specplus.core.budget import RowBudget
from vllm_specplus.core.growth import Candidates
from vllm_specplus.proposers.base import DraftRequest, Proposer

PREFIX = 8
Truth = dict[tuple[int, ...], list[list[int]]]
_TRUTH: Truth = {}


def learn(prompt: Sequence[int], output: Sequence[int]) -> None:
    """Records a sequence of plain decoding for the oracle."""
    sequence = [*prompt, *output]
    _TRUTH.setdefault(tuple(sequence[: min(PREFIX, len(prompt))]), []).append(sequence)


def truth() -> Truth:
    """All that was recorded; the oracle of an in-process engine keeps seeing what is added."""
    return _TRUTH


def continuations(truth: Truth, token_ids: Sequence[int]) -> list[list[int]]:
    """What plain decoding is known to emit after `token_ids`, one list per recorded sequence."""
    known = list(token_ids)
    keys = {tuple(known[:n]) for n in range(1, PREFIX + 1)}
    return [
        sequence[len(known) :]
        for key in keys
        for sequence in truth.get(key, ())
        if sequence[: len(known)] == known
    ]


class Oracle(Proposer):
    """Random trees with the true continuation hidden in random branches.

    Decoys are random tokens or true tokens at wrong places; siblings are distinct. Deterministic
    per sequence. Now and then there is no draft at all.
    """

    def __init__(self, config: SpecPlusConfig, truth: Truth) -> None:
        super().__init__(config)
        self.truth = truth

    def propose(self, requests: Sequence[DraftRequest]) -> list[Candidates]:
        return [self._tree(request) for request in requests]

    def _tree(self, request: DraftRequest) -> Candidates:
        token_ids = request.token_ids.tolist()
        rng = random.Random(repr(token_ids[-PREFIX:]) + str(len(token_ids)))
        known = [rest for rest in continuations(self.truth, token_ids) if rest] or [[]]
        return plant(rng.choice(known), random_shape(request, rng), rng)


def random_shape(request: DraftRequest, rng: random.Random) -> list[int]:
    """Parents of a random tree within the request's bounds, a chain where one is asked for."""
    if rng.random() < 0.1:
        return []
    parents: list[int] = []
    depths = [0]
    for row in range(1, rng.randint(1, request.max_nodes) + 1):
        open_rows = [row - 1] if request.chain_only else range(row)
        open_rows = [r for r in open_rows if depths[r] < request.max_depth]
        if not open_rows:
            break
        parents.append(rng.choice(open_rows))
        depths.append(depths[parents[-1]] + 1)
    return parents


def plant(rest: Sequence[int], parents: Sequence[int], rng: random.Random) -> Candidates:
    """Hides a part of `rest` on a random path below the root, with decoys around it."""
    children: dict[int, list[int]] = {}
    for row, parent in enumerate(parents, start=1):
        children.setdefault(parent, []).append(row)
    tokens: dict[int, int] = {}
    row = 0
    for token in rest:
        if row not in children or rng.random() < 0.1:
            break
        row = rng.choice(children[row])
        tokens[row] = token
    for rows in children.values():
        taken = {tokens[r] for r in rows if r in tokens}
        for r in rows:
            if r not in tokens:
                tokens[r] = decoy(rest, taken, rng)
    order = range(1, len(parents) + 1)
    return Candidates([tokens[r] for r in order], parents, [1 / (r + 1) for r in order])


def decoy(rest: Sequence[int], taken: set[int], rng: random.Random) -> int:
    """A random token or a true one at a wrong place; not in `taken`, to which it is added."""
    while True:
        token = rng.choice(rest[:8]) if rest and rng.random() < 0.3 else rng.randrange(VOCAB_SIZE)
        if token not in taken:
            taken.add(token)
            return token


class Probe:
    """Counts what a round verified and moved."""

    def __init__(self, spec_round: Any) -> None:
        self._commit, self._observe = spec_round.commit, spec_round.observe
        spec_round.commit, spec_round.observe = self._on_commit, self._on_observe
        self.reset()

    def reset(self) -> None:
        self.accepted = self.drafted = self.moved = 0

    def _on_commit(self, staged: Any, on_path: Any) -> Any:
        moves = self._commit(staged, on_path)
        self.moved += len(moves)
        return moves

    def _on_observe(
        self, req_id: str, tree: Any, accepted_rows: Sequence[int], row_tokens: Sequence[int]
    ) -> None:
        self.drafted += len(tree)
        self.accepted += len(accepted_rows)
        self._observe(req_id, tree, accepted_rows, row_tokens)


def watch(worker: Any, truth: Truth | None) -> Probe:
    """Runs on a worker: a budget that knows no costs, so it gives every node its row; the oracle if
    there is a truth; and a probe."""
    spec_round = worker.worker.model_runner.round
    spec_round.budget = RowBudget()
    if truth is not None:
        spec_round.proposer = Oracle(spec_round.proposer.config, truth)
    return Probe(spec_round)
