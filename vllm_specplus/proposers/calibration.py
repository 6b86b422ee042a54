"""How likely the target samples the token that earlier text votes for.

The prior is a line in log-odds, fitted to Gemma-3-270M on Spec-Bench (greedy and temperature 0.8;
`benchmarks/ngram_replay.py` prints its reliability). Online, cells of similar votes scale it by
observed over expected hits, so it follows the model, the traffic and the temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log, log2

from vllm_specplus.core.growth import Path
from vllm_specplus.proposers.ngram_index import LONGEST_MATCH

_CONSTANT, _PER_DOUBLING, _PER_SHARE = -0.70, 0.81, 1.29
_BY_LENGTH = [0.0] + [_CONSTANT + _PER_DOUBLING * log2(n) for n in range(1, LONGEST_MATCH + 1)]
MAX_PROB = 0.999
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


class Expectations:
    """What was expected to follow a request's tokens, until they come.

    `at(path)`: token -> (cell to tell the outcome to, its prior), after a path of drafted tokens.
    """

    def __init__(self) -> None:
        self._by_path: dict[Path, dict[int, tuple[Cell, float]]] = {}

    def at(self, path: Path) -> dict[int, tuple[Cell, float]]:
        return self._by_path.setdefault(path, {})

    def settle(self, tokens: Sequence[int]) -> None:
        """Learns from the tokens that came instead, and starts anew."""
        path: Path = ()
        for token in tokens:
            if path not in self._by_path:
                break
            for candidate, (cell, prior) in self._by_path[path].items():
                cell.observe(prior, candidate == token)
            path = (*path, token)
        self._by_path = {}


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
        return min(prior * cell.hits / cell.expected, MAX_PROB), cell, prior
