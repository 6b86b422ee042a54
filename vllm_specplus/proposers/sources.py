"""Several sources in one tree: what drafters and n-grams propose at the same place.

A token that several propose is one candidate, and what each source and their agreement are worth
is learned online.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from math import exp, log, log2, prod

from vllm_specplus.core.growth import Path
from vllm_specplus.proposers.calibration import MAX_PROB, Cell, Expectations
from vllm_specplus.proposers.ngram import Votes

Drafted = Callable[[Path], Mapping[int, float]]
"""What a drafter proposes after a path: token -> probability."""
_LEAST_BIN = 9


class SourceCells:
    """How often candidates were right, by what proposed them and how sure it was."""

    def __init__(self) -> None:
        self._cells: dict[tuple[str, bool, int, int], Cell] = {}

    def estimate(self, source: str, contested: bool, depth: int, prob: float) -> tuple[float, Cell]:
        """Probability that the target samples the token, and the cell that learns the outcome.

        contested: whether another source has candidates at the same place.
        """
        key = source, contested, depth, min(int(-2 * log2(prob)), _LEAST_BIN)
        cell = self._cells.setdefault(key, Cell())
        return min(prob * cell.hits / cell.expected, MAX_PROB), cell


class Sources:
    """The candidates of one request's tree, by path.

    drafted: by the name of the drafter; what it says of a path must not change once that has been
    expanded. expectations: of the request; votes: its n-grams, None without.
    """

    def __init__(
        self,
        drafted: Mapping[str, Drafted],
        votes: Votes | None,
        cells: SourceCells,
        expectations: Expectations,
    ) -> None:
        self._drafted, self._votes = drafted, votes
        self._cells, self._expectations = cells, expectations
        self._matched: dict[Path, dict[int, float]] = {}
        self._expanded: dict[Path, list[tuple[int, float]]] = {}

    def expand(self, path: Path) -> list[tuple[int, float]]:
        """The candidates after a path, for `grow`."""
        if path not in self._expanded:
            self._expanded[path] = [*self._expand(path)]
        return self._expanded[path]

    def _expand(self, path: Path) -> Iterator[tuple[int, float]]:
        proposed = {name: after(path) for name, after in self._drafted.items()}
        proposed["ngram"] = self.matches(path)
        contested = sum(map(bool, proposed.values())) > 1
        expected = self._expectations.at(path)
        for token in dict.fromkeys(chain.from_iterable(proposed.values())):
            probs = {name: tokens[token] for name, tokens in proposed.items() if token in tokens}
            prob = 1 - prod(1 - each for each in probs.values())
            prob = prob if len(probs) > 1 else sum(probs.values())
            estimate, cell = self._cells.estimate("+".join(probs), contested, len(path), prob)
            expected[token] = cell, prob
            yield token, log(estimate)

    def matches(self, path: Path) -> dict[int, float]:
        """What n-grams propose after a path that they have proposed."""
        if self._votes is None:
            return {}
        if path not in self._matched:
            follows = not path or path[-1] in self.matches(path[:-1])
            found = self._votes(path) if follows else ()
            self._matched[path] = {token: exp(logprob) for token, logprob in found}
        return self._matched[path]
