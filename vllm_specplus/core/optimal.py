"""The best static tree for measured acceptance (Sequoia, Chen et al. 2024, arXiv 2402.12374).

`rates[d][k]` is the probability that the target takes the draft of rank k at depth d + 1, if it
took the drafts above. A tree is expected to bring the sum over its nodes of the product of the
rates on the way to each. The most that n nodes below one parent bring, namely its children of
depth d and ranks from k on and what is below them, is

    F(d, k, n) = max over m of  rates[d][k] * (1 + F(d + 1, 0, m - 1)) + F(d, k + 1, n - m)

where m nodes are given to the child of rank k and what is below it, and 0 where m is 0, as no child
comes without its elder siblings. A depth or rank without a rate brings nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vllm_specplus.core.growth import Path

Rates = Sequence[Sequence[float]]


class OptimalTrees:
    """The best trees of up to `max_nodes` nodes, as deep as there are rates."""

    def __init__(self, rates: Rates, max_nodes: int) -> None:
        self._most: list[list[np.ndarray]] = []
        self._given: list[list[np.ndarray]] = []
        below = np.zeros(max_nodes + 1)
        for of_depth in reversed(rates):
            values, gifts = self._level(of_depth, below)
            self._most.insert(0, values)
            self._given.insert(0, gifts)
            below = values[0]
        self.expected = below
        """Tokens accepted of the best tree of n nodes: float64 [max_nodes + 1]."""

    @staticmethod
    def _level(
        rates: Sequence[float], below: np.ndarray
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """F and the m that gives it, by k, from F of the next depth: [num_ranks + 1], each [n]."""
        size = len(below)
        values, gifts = [np.zeros(size)], [np.zeros(size, dtype=np.int64)]
        for rate in reversed(rates):
            younger = values[0]
            sums = np.zeros((size, size))  # [n, m]
            for n in range(1, size):
                sums[n, 1 : n + 1] = rate * (1 + below[:n]) + younger[n - 1 :: -1][:n]
            gifts.insert(0, sums.argmax(1))
            values.insert(0, sums.max(1))
        return values, gifts

    def paths(self, num_nodes: int) -> list[Path]:
        """The best tree: per node the ranks on its way. What would bring nothing is left out."""
        found: list[Path] = []

        def give(above: Path, rank: int, nodes: int) -> None:
            while len(above) < len(self._given) and nodes > 0:
                given = int(self._given[len(above)][rank][nodes])
                if not given:
                    return
                found.append((*above, rank))
                give(found[-1], 0, given - 1)
                rank, nodes = rank + 1, nodes - given

        give((), 0, num_nodes)
        return found


def prior_rates(rate: float, num_ranks: int, max_depth: int) -> list[list[float]]:
    """What is assumed without measurement: rank r is right with probability rate * (1 - rate) ** r,
    at every depth."""
    return [[rate * (1 - rate) ** rank for rank in range(num_ranks)]] * max_depth
