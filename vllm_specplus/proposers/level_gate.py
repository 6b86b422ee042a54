"""Whether drafting one more level is worth its time, learned while serving."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_specplus.core.cost import CostModel, fastest
from vllm_specplus.core.growth import MAX_FRONTIER

MAX_TIMED_ROWS = 16
"""Levels with more committed rows a request catch up with a prompt or with undrafted text; what
that takes says nothing of the next level."""
MAX_MISSED_ROWS = 4096
"""Committed rows of a request that the closed level of a draft model may miss. Then it is run: of
a row that costs more than trials save, it would only miss more. Modules begin anew before that."""
_START, _SMOOTHING, _TRIED_SMOOTHING = 0.7, 0.1, 0.3
_TRIALS = 0.01
"""The part of the time that closed levels are tried again for."""
_MARGIN = 1.5
"""By how much a level must promise to be worth more than its time, as estimates err."""
_CATCH_UP_STEPS = 32
"""Over how many steps of a request the rows that its level has missed are written off."""


@dataclass(frozen=True, slots=True)
class Prospect:
    """What a level may bring one request, in expected tokens, and the rows that it would run.

    known: without drafting it (other sources' candidates). most: if every draft were right.
    min_prob, token_ms: of its DraftRequest. num_known, num_nodes: as in RequestRows.
    """

    known: float
    most: float
    min_prob: float
    token_ms: float
    num_known: int
    num_nodes: int

    def worth_ms(self, share: float) -> float:
        """Milliseconds saved if the level brings `share` of what it could."""
        gain = share * (self.most - self.known) - self.min_prob
        return gain * self.token_ms if gain > 0 else 0.0

    def num_rows(self, steps: int) -> float:
        """Rows of this step, where missed ones are written off over so many."""
        return min(self.num_known, 1) + self.num_nodes + max(self.num_known - 1, 0) / steps


class LevelGate:
    """Opens a level if the tokens that it brought so far were clearly worth more than its time.

    cost: milliseconds of a level by its rows; levels are free until the engine has measured it. A
    closed level is tried again once it has saved `_TRIALS` of the time that it takes, rows that it
    has missed included, so trials cost no more than that, or once it has missed too many rows.

    What a level brings is learned for each size of batch, to a power of two: where rows are dear,
    its nodes get none, and that says nothing of a smaller batch.
    """

    def __init__(self, num_levels: int) -> None:
        self.cost: CostModel | None = None
        self._shares: dict[tuple[int, int], float] = defaultdict(lambda: _START)
        self._saved_ms = [0.0] * num_levels
        self._tried = [False] * num_levels

    def measure(
        self, draft: Callable[[int], object], most: int, target: Callable[[], object]
    ) -> None:
        """Times `draft` over one, some and `most` rows.

        target: runs the target, whose weights have then been in the caches last, as in a step.
        """

        def draft_ms(num_rows: int) -> float:
            target()
            began = time.perf_counter()
            draft(num_rows)
            return 1e3 * (time.perf_counter() - began)

        self.cost = CostModel(fastest(draft_ms, sorted({1, min(MAX_FRONTIER, most), most})))

    def opens(self, level: int, prospects: Sequence[Prospect]) -> bool:
        share = self._shares[level, len(prospects).bit_length()]
        worth = sum(prospect.worth_ms(share) for prospect in prospects)
        self._tried[level] = False
        if any(prospect.num_known > MAX_MISSED_ROWS for prospect in prospects):
            return True
        if worth >= _MARGIN * self._ms(prospects, _CATCH_UP_STEPS):
            return True
        self._saved_ms[level] += _TRIALS * sum(prospect.token_ms for prospect in prospects)
        self._tried[level] = self._saved_ms[level] >= self._ms(prospects, 1)
        if self._tried[level]:
            self._saved_ms[level] = 0.0
        return self._tried[level]

    def observe(
        self, level: int, prospects: Sequence[Prospect], gains: Sequence[float], ms: float
    ) -> None:
        """A level was drafted in `ms`. gains: per request, the expected tokens of its nodes that
        got rows, beyond what was known without it."""
        typical = all(prospect.num_known <= MAX_TIMED_ROWS for prospect in prospects)
        if self.cost is not None and typical:
            self.cost.observe(round(sum(p.num_rows(1) for p in prospects)), ms)
        room = sum(prospect.most - prospect.known for prospect in prospects)
        if room > 0:
            share = min(max(sum(gains), 0.0) / room, 1.0)
            smoothing = _TRIED_SMOOTHING if self._tried[level] else _SMOOTHING
            key = level, len(prospects).bit_length()
            self._shares[key] += smoothing * (share - self._shares[key])

    def _ms(self, prospects: Sequence[Prospect], steps: int) -> float:
        if self.cost is None:
            return 0.0
        return float(self.cost.step_ms(sum(prospect.num_rows(steps) for prospect in prospects)))
