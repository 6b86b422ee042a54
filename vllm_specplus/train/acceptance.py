"""How often drafts are right on held-out text, and what chains and trees make of it.

Ranks are taken on greedy text of the target with the right tokens before each draft. A draft of
depth k counts only where all before it were right, so this is what a greedy engine accepts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TOP = (1, 2, 4)
TREE_SIZES = (4, 8, 16)
Path = tuple[int, ...]


def rank_of(logits: Tensor, place: Tensor) -> Tensor:
    """Rank, from 0, of one column per row: int64 [num_rows].

    logits: [num_rows, num_columns]; place: int64 [num_rows], the column, -1 where the right token
    is none of them and comes last. Equal logits rank by column, as argmax does; NaN beats all.
    """
    columns = torch.arange(logits.shape[1], device=logits.device)
    right = logits.gather(1, place.clamp(min=0)[:, None])
    before = (logits == right) & (columns < place[:, None])
    ranks = (~(logits <= right) | before).sum(1)
    return torch.where(place < 0, logits.shape[1], ranks)


@dataclass(frozen=True, slots=True)
class Ranks:
    """rank: int64 [num_depths, num_rounds], place of the right token among the drafts, from 0, in a
    round whose root has a known token after it at every depth; kinds: of each round; samples: the
    number of its text, whose rounds come one after the other, a root each token."""

    rank: Tensor
    kinds: tuple[str, ...]
    samples: tuple[int, ...]

    def of(self, kind: str) -> Ranks:
        """The rounds of one kind."""
        return self._take([place for place, each in enumerate(self.kinds) if each == kind])

    def walk(self) -> Ranks:
        """The rounds that a chain has: behind the tokens that one accepts, and one more, comes the
        next. Easy text takes few of them."""
        right = (self.rank == 0).long().cumprod(0).sum(0).tolist()
        taken, sample, due = list[int](), -1, 0
        for place, each in enumerate(self.samples):
            if each != sample or place == due:
                taken.append(place)
                sample, due = each, place + right[place] + 1
        return self._take(taken)

    def _take(self, rounds: Sequence[int]) -> Ranks:
        kinds = tuple(self.kinds[place] for place in rounds)
        samples = tuple(self.samples[place] for place in rounds)
        return Ranks(self.rank[:, list(rounds)], kinds, samples)

    def top(self, num: int) -> list[float]:
        """Per depth the share of rounds whose right token is among the first `num` drafts."""
        return [float(row) for row in (self.rank < num).double().mean(1)]

    def chain(self) -> float:
        """Drafts accepted a round by a chain of the first drafts."""
        return sum(self.reached())

    def reached(self) -> list[float]:
        """Per depth the share of rounds in which a chain is right down to there."""
        return [float(share) for share in (self.rank == 0).double().cumprod(0).mean(1)]

    def tree(self, num_nodes: int) -> float:
        """Drafts accepted a round by a good static tree, chosen on every other round and counted on
        the rest (Medusa's construction: Cai et al. 2024, arXiv 2401.10774)."""
        chosen, counted = (half.T.tolist() for half in (self.rank[:, ::2], self.rank[:, 1::2]))
        counts = Counter(path for ranks in chosen for path in _prefixes(ranks))
        nodes = set(_grow(counts, num_nodes, len(self.rank)))
        hits = [sum(path in nodes for path in _prefixes(ranks)) for ranks in counted]
        return sum(hits) / max(1, len(hits))


def _grow(counts: Counter[Path], num_nodes: int, max_depth: int) -> Iterator[Path]:
    """The paths of ranks of a tree, most frequent first; siblings have ranks without a gap."""
    frontier: list[Path] = [(0,)]
    for _ in range(num_nodes):
        best = max(frontier, key=lambda path: (counts[path], -sum(path) - len(path)))
        frontier.remove(best)
        yield best
        frontier.append((*best[:-1], best[-1] + 1))
        if len(best) < max_depth:
            frontier.append((*best, 0))


def _prefixes(ranks: list[int]) -> list[Path]:
    return [tuple(ranks[: depth + 1]) for depth in range(len(ranks))]
