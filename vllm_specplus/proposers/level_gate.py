"""Whether drafting one more level is worth its time, learned while serving."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_START, _CURIOSITY, _SMOOTHING, _OUTLIER = 0.7, 1.01, 0.1, 2.0


@dataclass(frozen=True, slots=True)
class Prospect:
    """What a level may bring one request, in expected tokens.

    known: without drafting it (other sources' candidates). most: if every draft were right.
    min_prob, token_ms: of its DraftRequest.
    """

    known: float
    most: float
    min_prob: float
    token_ms: float

    def worth_ms(self, share: float) -> float:
        """Milliseconds saved if the level brings `share` of what it could."""
        gain = share * (self.most - self.known) - self.min_prob
        return gain * self.token_ms if gain > 0 else 0.0


class LevelGate:
    """Opens a level if the tokens that it brought so far were worth more than its time.

    A level that stays closed is thought a little better of every time, so it is tried again: often
    where it nearly pays, seldom where it does not.
    """

    def __init__(self, num_levels: int) -> None:
        self._shares = [_START] * num_levels
        self._ms: dict[int, float] = {}

    def opens(self, level: int, prospects: Sequence[Prospect]) -> bool:
        share = self._shares[level]
        ms = self._ms.get(len(prospects), 0.0)
        if sum(prospect.worth_ms(share) for prospect in prospects) >= ms:
            return True
        self._shares[level] = min(share * _CURIOSITY, 1.0)
        return False

    def observe(
        self, level: int, prospects: Sequence[Prospect], tokens: Sequence[float], ms: float | None
    ) -> None:
        """A level was drafted in `ms` and brought so many expected tokens per request.

        ms: None where it is not typical.
        """
        if ms is not None:
            before = self._ms.setdefault(len(prospects), ms)
            self._ms[len(prospects)] += _SMOOTHING * (min(ms, _OUTLIER * before) - before)
        room = sum(prospect.most - prospect.known for prospect in prospects)
        if room > 0:
            known = sum(prospect.known for prospect in prospects)
            share = min(max(sum(tokens) - known, 0.0) / room, 1.0)
            self._shares[level] += _SMOOTHING * (share - self._shares[level])
