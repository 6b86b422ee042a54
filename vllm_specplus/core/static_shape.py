"""A static tree on the device: which of a batch of grown nodes lie on its paths."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Path = tuple[int, ...]


class StaticShape:
    """Paths of ranks, as `growth.prune` takes them: (0, 1) is the second best child of the best
    candidate (Medusa, Cai et al. 2024, arXiv 2401.10774)."""

    def __init__(self, paths: Sequence[Path], device: torch.device) -> None:
        row = {(): 0} | {path: index + 1 for index, path in enumerate(paths)}
        children = torch.full((len(row), 2 + max(path[-1] for path in paths)), -1)
        for path in paths:
            children[row[path[:-1]], path[-1]] = row[path]
        self._depth = max(map(len, paths))
        self._children = children.to(device)  # [rows, rank] -> row; the last rank stands for others
        self._parents = torch.tensor([-1, *(row[path[:-1]] for path in paths)], device=device)

    def children(self, rows: torch.Tensor, num: int) -> torch.Tensor:
        """The shape's rows of the best `num` children of each of `rows`, [num_reqs, width] int64.

        Returns [num_reqs, width * num]; -1 is no row and has no children.
        """
        ranks = torch.arange(num, device=rows.device).clamp(max=self._children.shape[1] - 1)
        children = self._children[rows.clamp(min=0)[:, :, None], ranks]
        return children.where(rows[:, :, None] >= 0, -1).flatten(1)

    def fit(self, tokens: torch.Tensor, parents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Puts nodes in the shape's rows, [num_reqs, rows] both; free rows have token -1.

        tokens, parents: [num_reqs, num_rows] int64, row 0 the root, siblings best first, token -1
        at padding.

        >>> shape = StaticShape([(0,), (1,), (0, 0)], torch.device("cpu"))
        >>> shape.fit(torch.tensor([[-1, 7, 8, 9, 6]]), torch.tensor([[-1, 0, 1, 0, 0]]))[0]
        tensor([[-1,  7,  9,  8]])
        """
        is_node = tokens >= 0
        above = parents.clamp(min=0)
        order = torch.arange(tokens.shape[1], device=tokens.device)
        elder = (above[:, :, None] == above[:, None]) & is_node[:, None] & (order < order[:, None])
        rank = elder.sum(2).clamp(max=self._children.shape[1] - 1)
        row = torch.where(order == 0, 0, -1).expand_as(tokens)
        for _ in range(self._depth):
            parent_row = row.gather(1, above)
            child = self._children[parent_row.clamp(min=0), rank]
            row = torch.where(is_node & (parent_row >= 0), child, row)
        fitted = tokens.new_full((len(tokens), len(self._parents) + 1), -1)
        fitted.scatter_(1, row.where(row > 0, len(self._parents)), tokens)
        return fitted[:, :-1], self._parents.expand(len(tokens), -1)
