"""Token trees: one request's (`Tree`) and a batch of them as tensors (`TreeBatch`).

Row 0 is the root: the last token the target model has sampled. Node i is row i (i >= 1), and
`parents[i] < i` is the row of its parent, so that every prefix of the rows is a tree: whoever
truncates the draft list upstream cuts a tree into a smaller tree. A chain is a tree of width 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from specplus_kernels.tree_grow.rows import MAX_ROWS, WORD_BITS

TOKEN_BITS = 32
_TOKEN_MASK = (1 << TOKEN_BITS) - 1


class QKind(Enum):
    """How a node was drafted, which decides the verification rules that are exact for it."""

    DETERMINISTIC = "deterministic"
    """A fixed choice (top-k, n-gram, lookahead): q is a point mass."""
    SAMPLED = "sampled"
    """Drawn from a draft distribution whose log-probabilities are kept."""


@dataclass(frozen=True, slots=True)
class Tree:
    """One request's candidates below its root.

    `tokens[i]` and `parents[i]` describe node i + 1; a parent is a row number (0 = root). Siblings
    carry distinct tokens. A token of -1 is a placeholder that no target token equals. All nodes of
    a tree have one kind of q: no rule built here is exact for a mix.
    """

    tokens: Sequence[int] = ()
    parents: Sequence[int] = ()
    kind: QKind = QKind.DETERMINISTIC

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def chain(cls, tokens: Sequence[int]) -> Tree:
        return cls(tokens, range(len(tokens)))

    def prefix(self, num_nodes: int) -> Tree:
        return Tree(self.tokens[:num_nodes], self.parents[:num_nodes], self.kind)

    @property
    def branches(self) -> bool:
        """Whether it is more than a chain."""
        return any(parent != row for row, parent in enumerate(self.parents))

    def as_chain(self) -> Tree:
        """The leading nodes that form a chain; those after them become placeholders."""
        stem = next((row for row, parent in enumerate(self.parents) if parent != row), len(self))
        return Tree.chain([*self.tokens[:stem], *[-1] * (len(self) - stem)])

    def depths(self) -> list[int]:
        """Depth per row, the root's 0 first: [num_nodes + 1]."""
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent] + 1)
        return depths

    def ancestors(self) -> list[int]:
        """Bitmask per row of the rows on its path, itself included: [num_nodes + 1]."""
        masks = [1]
        for row, parent in enumerate(self.parents, start=1):
            masks.append(masks[parent] | 1 << row)
        return masks

    def validate(self) -> None:
        """Raises ValueError unless parents precede children and siblings differ."""
        if len(self.tokens) != len(self.parents) or len(self) >= MAX_ROWS:
            raise ValueError(
                f"tree has {len(self.tokens)} tokens and {len(self.parents)} parents; both must be "
                f"the same number, at most {MAX_ROWS - 1}"
            )
        seen = set()
        for row, (token, parent) in enumerate(zip(self.tokens, self.parents, strict=True), start=1):
            if not 0 <= parent < row:
                raise ValueError(f"parent of row {row} is {parent}; it must be in [0, {row})")
            if token >= 0 and (parent, token) in seen:
                raise ValueError(f"row {row} repeats token {token} under parent {parent}")
            seen.add((parent, token))

    def encode(self) -> list[int]:
        """One int per node that carries token and parent through vLLM's flat draft lists.

        The upper bits hold how many rows the parent lies before the previous row, so a chain is
        encoded as its plain tokens and a prefix of the codes is the code of the prefix.
        """
        return [
            token if parent == row else token | (row - parent) << TOKEN_BITS
            for row, (token, parent) in enumerate(zip(self.tokens, self.parents, strict=True))
        ]

    @classmethod
    def decode(cls, codes: Sequence[int]) -> Tree:
        """Inverse of `encode`; negative codes are placeholders of a chain."""
        tokens = [code if code < 0 else code & _TOKEN_MASK for code in codes]
        parents = [
            row if code < 0 else row - (code >> TOKEN_BITS) for row, code in enumerate(codes)
        ]
        return cls(tokens, parents)


@dataclass(frozen=True, slots=True)
class TreeBatch:
    """Trees of a batch, padded to `num_rows = 1 + most nodes`; row 0 is each request's root.

    tokens, parents, depths: int64 [num_reqs, num_rows]; the root's parent is -1, and padding rows
    carry token -1, parent 0 and depth 0.
    num_nodes: int64 [num_reqs].
    ancestor_mask: int64 [num_reqs, num_rows, words]; bit j of word w is row 64 * w + j. A padding
    row's mask is empty.
    is_sampled: bool [num_reqs, num_rows], the nodes whose q is a draft distribution (QKind).
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor
    num_nodes: torch.Tensor
    ancestor_mask: torch.Tensor
    is_sampled: torch.Tensor

    @property
    def num_rows(self) -> int:
        return self.tokens.shape[1]

    @classmethod
    def from_trees(cls, trees: Sequence[Tree], device: torch.device | str = "cpu") -> TreeBatch:
        """Builds the tensors on the host."""
        num_rows = 1 + max((len(tree) for tree in trees), default=0)
        words = -(-num_rows // WORD_BITS)
        tokens = np.full((len(trees), num_rows), -1, dtype=np.int64)
        parents = np.zeros_like(tokens)
        depths = np.zeros_like(tokens)
        masks = np.zeros((len(trees), num_rows, words), dtype=np.uint64)
        parents[:, 0] = -1
        masks[:, 0, 0] = 1
        is_sampled = np.zeros(tokens.shape, dtype=bool)
        for r, tree in enumerate(trees):
            if n := len(tree):
                tokens[r, 1 : n + 1] = tree.tokens
                parents[r, 1 : n + 1] = tree.parents
                depths[r, : n + 1] = tree.depths()
                masks[r, : n + 1] = ancestor_words(tree.ancestors(), words)
                is_sampled[r, 1 : n + 1] = tree.kind is QKind.SAMPLED
        num_nodes = np.array([len(tree) for tree in trees], dtype=np.int64)

        def tensor(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(device)

        return cls(
            tokens=tensor(tokens),
            parents=tensor(parents),
            depths=tensor(depths),
            num_nodes=tensor(num_nodes),
            ancestor_mask=tensor(masks.view(np.int64)),
            is_sampled=tensor(is_sampled),
        )

    def valid(self) -> torch.Tensor:
        """bool [num_reqs, num_rows]: the rows that are no padding."""
        rows = torch.arange(self.num_rows, device=self.tokens.device)
        return rows <= self.num_nodes[:, None]


def ancestor_words(masks: Sequence[int], words: int) -> np.ndarray:
    """Splits Python bitmasks into uint64 words: [len(masks), words]."""
    low = (1 << WORD_BITS) - 1
    return np.array(
        [[mask >> WORD_BITS * w & low for w in range(words)] for mask in masks], dtype=np.uint64
    )


def encode(
    tokens: torch.Tensor,  # [num_reqs, num_nodes + 1], -1 on padding rows
    parents: torch.Tensor,  # [num_reqs, num_nodes + 1]
    filler: torch.Tensor,  # [num_reqs, 1]
    chain_only: torch.Tensor,  # [num_reqs] bool
) -> torch.Tensor:  # [num_reqs, num_nodes] int64
    """Codes of the nodes (`Tree.encode`); what is no node, or leaves a chain, becomes filler.

    The engine schedules every row, and filler on a chain is a draft like any other: right if the
    target happens to say so.
    """
    tokens, parents = tokens[:, 1:], parents[:, 1:]
    before = torch.arange(tokens.shape[1], device=tokens.device)
    dropped = (tokens < 0) | (chain_only[:, None] & (parents != before)).cumsum(1).bool()
    codes = tokens | (before - parents) << TOKEN_BITS
    return torch.where(dropped, filler, codes)
