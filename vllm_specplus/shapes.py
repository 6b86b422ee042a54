"""Shapes of drafts as the user writes them: `parse_tree` reads a text form, `str` writes it back.

`chain`, `static:[(0,),(0,0),(1,)]` or `dynamic:12`; published ones have names,
`medusa:mc_sim_7b_63`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from vllm_specplus.errors import bad_option
from vllm_specplus.medusa_trees import MEDUSA_TREES

MAX_NODES = 127
"""Nodes of one tree: with the root they are the 128 rows of an ancestor mask."""

Path = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Chain:
    """One candidate per depth."""

    def __str__(self) -> str:
        return "chain"


@dataclass(frozen=True, slots=True)
class StaticTree:
    """A fixed shape: per node the ranks on its way from the root.

    (0, 1) is the second best child of the best candidate (Medusa, Cai et al. 2024, arXiv
    2401.10774). Siblings have the ranks 0, 1, 2, ... without a gap. The order in which paths are
    given means nothing; they are kept by sum of (rank + 1), so every prefix is a tree.
    """

    paths: tuple[Path, ...]

    def __post_init__(self) -> None:
        paths = set(self.paths)
        if not 1 <= len(paths) <= MAX_NODES:
            raise bad_option(
                "speculative_tree",
                str(self),
                f"has {len(paths)} nodes, but a tree has 1 to {MAX_NODES}",
                "give fewer paths" if paths else "give at least (0,)",
            )
        for path in sorted(paths):
            needed = (*path[:-1], path[-1] - 1) if path[-1] else path[:-1]
            if needed and needed not in paths:
                kin = "sibling of the rank before, " if path[-1] else "parent "
                raise bad_option(
                    "speculative_tree",
                    str(self),
                    f"has node {path} without its {kin}{needed}",
                    f"add {needed} or take {path} away",
                )
        ordered = sorted(paths, key=lambda path: (len(path) + sum(path), path))
        object.__setattr__(self, "paths", tuple(ordered))

    @property
    def depth(self) -> int:
        return max(map(len, self.paths))

    def __str__(self) -> str:
        return f"static:{list(self.paths)}".replace(" ", "")


@dataclass(frozen=True, slots=True)
class DynamicTree:
    """At most `max_nodes` nodes per step, placed where they are most likely to be accepted."""

    max_nodes: int

    def __post_init__(self) -> None:
        if not 1 <= self.max_nodes <= MAX_NODES:
            raise bad_option(
                "speculative_tree",
                str(self),
                f"is out of range: a tree has 1 to {MAX_NODES} nodes",
                "write for example 'dynamic:12'",
            )

    def __str__(self) -> str:
        return f"dynamic:{self.max_nodes}"


TreeSpec = Chain | StaticTree | DynamicTree


@dataclass(frozen=True)
class LookaheadShape:
    """Window W, n-gram N and candidates G of Lookahead decoding (Fu et al. 2024, arXiv 2402.02057).

    The window is a tree of N - 1 levels of W guesses, of which the first is the root. Defaults: the
    wider the window, the less a row brings. With W, N, G = 5, 4, 5 a round gave 1.78 tokens and a
    row of the window found 0.12; with 10, 4, 5 it was 1.86 and 0.07, with 15, 5, 15 1.99 and 0.04
    (Gemma-3-270M, 24 prompts of Spec-Bench, greedy, no n-grams of the prompt; 2.02 with them).
    """

    window: int = 5
    ngram: int = 4
    candidates: int = 5

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> LookaheadShape:
        """From options by their names; what cannot be meant, pydantic refuses."""
        given = {field.name: options.get(f"lookahead_{field.name}") for field in fields(cls)}
        return cls(**{name: value for name, value in given.items() if isinstance(value, int)})

    @property
    def num_rows(self) -> int:
        """Nodes of the window."""
        return self.window * (self.ngram - 1) - 1

    @property
    def depth(self) -> int:
        """Of its last column, or of the candidates."""
        return max(self.window + self.ngram - 3, self.ngram - 1)

    @property
    def tree(self) -> DynamicTree:
        """Room for the window and the candidates."""
        num_nodes = self.num_rows + self.candidates * (self.ngram - 1)
        return DynamicTree(max(min(num_nodes, MAX_NODES), 1))


def parse_tree(value: str | TreeSpec) -> TreeSpec:
    """Reads the text form of a tree; raises OptionError."""
    if isinstance(value, TreeSpec):
        return value
    kind, _, rest = str(value).strip().partition(":")
    if kind == "chain" and not rest:
        return Chain()
    if kind == "dynamic" and re.fullmatch(r"-?\d{1,9}", rest.strip()):
        return DynamicTree(int(rest))
    paths = _literal_paths(rest) if kind == "static" else None
    paths = MEDUSA_TREES.get(rest.strip()) if kind == "medusa" else paths
    if paths is not None:
        return StaticTree(paths)
    raise bad_option(
        "speculative_tree",
        value,
        "cannot be read",
        "write 'chain', 'dynamic:12', 'medusa:mc_sim_7b_63' or 'static:[(0,),(0,0),(1,)]', one "
        "path of ranks per node",
    )


def _literal_paths(text: str) -> tuple[Path, ...] | None:
    """The paths in a Python list of tuples of ranks, or None if it is not one."""
    try:
        paths = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    if not isinstance(paths, (list, tuple)):
        return None
    for path in paths:
        if not isinstance(path, (list, tuple)) or not path:
            return None
        if not all(type(rank) is int and rank >= 0 for rank in path):
            return None
    return tuple(tuple(path) for path in paths)
