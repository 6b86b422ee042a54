"""Which ranks the target took at which depth: what static trees are made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm_specplus.core.tree import Tree


@dataclass(slots=True)
class RankCounts:
    """Counted over the trees that had nodes.

    by_rank: [depth][rank], accepted nodes by their rank among their siblings. by_row: [row],
    accepted nodes by their place in the tree; the root, which always is, counts the trees.
    """

    by_rank: list[list[int]] = field(default_factory=list)
    by_row: list[int] = field(default_factory=lambda: [0])

    def observe(self, tree: Tree, accepted_rows: Sequence[int]) -> None:
        """Counts a verified tree: the rows of its accepted path, root excluded."""
        if not len(tree):
            return
        for depth, row in enumerate(accepted_rows):
            parents = tree.parents[:row]
            rank = sum(parent == parents[-1] for parent in parents[:-1])
            if depth == len(self.by_rank):
                self.by_rank.append([])
            _count(self.by_rank[depth], rank)
        for row in (0, *accepted_rows):
            _count(self.by_row, row)

    def rates(self, max_depth: int) -> list[list[float]]:
        """Per depth and rank the share of accepted parents whose child of that rank was accepted,
        whether they had one or not."""
        parents = [self.by_row[0], *map(sum, self.by_rank)]
        return [
            [count / above for count in counts]
            for counts, above in zip(self.by_rank[:max_depth], parents, strict=False)
        ]

    def accepted(self, num_nodes: int) -> list[float]:
        """Tokens accepted of the first n nodes of a tree: [num_nodes + 1], n from 0."""
        rows = [*self.by_row[1:], *[0] * num_nodes][:num_nodes]
        total = 0
        return [0.0, *((total := total + count) / max(self.by_row[0], 1) for count in rows)]


def _count(counts: list[int], place: int) -> None:
    counts.extend([0] * (place + 1 - len(counts)))
    counts[place] += 1
