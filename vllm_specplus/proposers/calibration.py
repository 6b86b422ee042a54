"""How likely the target samples the token that earlier text votes for.

The prior is a line in log-odds, fitted to Gemma-3-270M on Spec-Bench (greedy and temperature 0.8;
`benchmarks/ngram_replay.py` prints its reliability). Online, cells of similar votes scale it by
observed over expected hits, so it follows the model, the traffic and the temperature.
"""

from __future__ import annotations

from math import exp, log, log2

from vllm_specplus.proposers.ngram_index import LONGEST_MATCH

_CONSTANT, _PER_DOUBLING, _PER_SHARE = -0.70, 0.81, 1.29
_BY_LENGTH = [0.0] + [_CONSTANT + _PER_DOUBLING * log2(n) for n in range(1, LONGEST_MATCH + 1)]
_MAX_PROB = 0.999
_LIKELY_SHARE = 0.45


class Cell:
    """Observed over expected hits of similar votes; starts as if it had seen 20 of each."""

    START = 20.0
    FORGET = 0.005

    __slots__ = ("expected", "hits")

    def __init__(self) -> None:
        self.hits = self.expected = self.START

    def observe(self, prior: float, hit: bool) -> None:
        self.hits += self.FORGET * (self.START - self.hits) + hit
        self.expected += self.FORGET * (self.START - self.expected) + prior


class Calibration:
    """Engine-wide estimate, learned from every request."""

    def __init__(self) -> None:
        num_lengths = LONGEST_MATCH.bit_length() + 1
        self._cells = [(Cell(), Cell()) for _ in range(num_lengths)]

    def estimate(self, length: int, share: float) -> tuple[float, Cell, float]:
        """(probability, cell to tell the outcome to, prior) of a token.

        length: of the longest match, at most LONGEST_MATCH. share: of the votes, in (0, 1).
        """
        prior = 1 / (1 + exp(-_BY_LENGTH[length] - _PER_SHARE * log(share / (1 - share))))
        cell = self._cells[length.bit_length()][share > _LIKELY_SHARE]
        return min(prior * cell.hits / cell.expected, _MAX_PROB), cell, prior
