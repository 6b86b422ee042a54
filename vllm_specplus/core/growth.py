"""How a tree grows: best-first under a node budget, along static paths, or as a chain.

`Candidates` are nodes with the estimated probability that all of their path is accepted, best
first. A child is never more probable than its parent, so best first is also prefix-is-tree order.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf, log

from vllm_specplus.core.tree import QKind, Tree

NUM_CHILDREN = 8
"""Candidates after a node, of drafters that run a model for each level."""
MAX_FRONTIER = 8
"""Nodes of a level that are continued."""

Path = tuple[int, ...]
Expand = Callable[[Path], Iterable[tuple[int, float]]]


@dataclass(frozen=True, slots=True)
class Candidates:
    """Draft nodes of one request, best first.

    tokens, parents: as in `Tree`. probs: per node, the estimated probability that the node and all
    its ancestors are accepted, in (0, 1], never rising.
    """

    tokens: Sequence[int] = ()
    parents: Sequence[int] = ()
    probs: Sequence[float] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    def paths(self) -> list[Path]:
        """The tokens from the root to each node."""
        paths: list[Path] = [()]
        for token, parent in zip(self.tokens, self.parents, strict=True):
            paths.append((*paths[parent], token))
        return paths[1:]

    def by_path(self) -> dict[Path, float]:
        """Path -> probability."""
        return dict(zip(self.paths(), self.probs, strict=True))

    def tree(self, num_nodes: int) -> Tree:
        return Tree(self.tokens[:num_nodes], self.parents[:num_nodes], QKind.DETERMINISTIC)

    def prefix(self, num_nodes: int) -> Candidates:
        return Candidates(self.tokens[:num_nodes], self.parents[:num_nodes], self.probs[:num_nodes])


def grow(
    expand: Expand,
    max_nodes: int,
    max_depth: int,
    min_prob: float = 0.0,
    paths: Collection[Path] | None = None,
) -> Candidates:
    """The `max_nodes` most probable nodes (EAGLE-2, Li et al. 2024, arXiv 2406.16858).

    `expand(path)` gives the candidates after a path of tokens: (token, log-probability given that
    the path is accepted), tokens distinct, log-probabilities <= 0, in any order. It is called at
    most once per path, parents first. Nodes below `min_prob` are left out, and so are those that
    are not on the static `paths`, if given (see `prune`).
    """
    tokens: list[int] = []
    parents: list[int] = []
    probs: list[float] = []
    least = log(min_prob) if min_prob > 0 else -inf
    tie = 0
    heap: list[tuple[float, int, int, Path, Path]] = []

    def push(path: Path, ranks: Path, row: int, logprob: float) -> None:
        nonlocal tie
        children = sorted(expand(path), key=lambda child: -child[1])
        for rank, (token, delta) in enumerate(children):
            below = ranks if paths is None else (*ranks, rank)
            if logprob + delta >= least and (paths is None or below in paths):
                heapq.heappush(heap, (-(logprob + delta), tie, row, (*path, token), below))
                tie += 1

    if min(max_nodes, max_depth) > 0:
        push((), (), 0, 0.0)
    while heap and len(tokens) < max_nodes:
        cost, _, parent, path, ranks = heapq.heappop(heap)
        tokens.append(path[-1])
        parents.append(parent)
        probs.append(exp(-cost))
        if len(path) < max_depth and len(tokens) < max_nodes:
            push(path, ranks, len(tokens), -cost)
    return Candidates(tokens, parents, probs)


def rank(probs: Mapping[Path, float], max_nodes: int) -> Candidates:
    """The `max_nodes` most probable nodes, each given by the tokens on its path.

    No path may be more probable than the one above it, which comes before it.
    """
    ranked = sorted(probs.items(), key=lambda node: -node[1])[:max_nodes]
    row = {(): 0} | {path: index for index, (path, _) in enumerate(ranked, start=1)}
    return Candidates(
        [path[-1] for path, _ in ranked],
        [row[path[:-1]] for path, _ in ranked],
        [prob for _, prob in ranked],
    )


def prune(candidates: Candidates, paths: Iterable[Path]) -> Candidates:
    """Keeps the nodes on static `paths`.

    A path names, level by level, the rank of a child among its siblings: (0, 1) is the second
    best child of the best candidate (Medusa, Cai et al. 2024, arXiv 2401.10774).
    """
    wanted = set(paths)
    rank_paths: list[Path | None] = [()]
    num_children: list[int] = [0]
    new_row = [0]
    tokens: list[int] = []
    parents: list[int] = []
    probs: list[float] = []
    for token, parent, prob in zip(
        candidates.tokens, candidates.parents, candidates.probs, strict=True
    ):
        above = rank_paths[parent]
        path = None if above is None else (*above, num_children[parent])
        num_children[parent] += 1
        num_children.append(0)
        if path not in wanted:
            path = None
        rank_paths.append(path)
        new_row.append(len(tokens) + 1)
        if path is not None:
            tokens.append(token)
            parents.append(new_row[parent])
            probs.append(prob)
    return Candidates(tokens, parents, probs)


def chain_paths(depth: int) -> list[Path]:
    """The static paths of a chain: the best child of the best child, `depth` levels down."""
    return [(0,) * d for d in range(1, depth + 1)]
