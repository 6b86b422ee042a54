"""Random trees, and what is computed from them in a second, naive way."""

from __future__ import annotations

from hypothesis import strategies as st

from vllm_specplus.core.tree import QKind, Tree

VOCAB_SIZE = 5


@st.composite
def trees(draw: st.DrawFn, max_nodes: int = 127, kind: QKind = QKind.DETERMINISTIC) -> Tree:
    """Valid trees of 0 to `max_nodes` nodes with few distinct tokens, wide ones and deep ones."""
    num_nodes = draw(st.integers(0, max_nodes))
    rng = draw(st.randoms(use_true_random=False))
    reach = draw(st.sampled_from([1, 2, 6, max_nodes]))  # 1 is a chain
    tokens: list[int] = []
    parents: list[int] = []
    taken: dict[int, set[int]] = {}
    for row in range(1, num_nodes + 1):
        parent = rng.randrange(max(row - reach, 0), row)
        siblings = taken.setdefault(parent, set())
        free = [t for t in range(VOCAB_SIZE + len(siblings)) if t not in siblings]
        tokens.append(rng.choice(free[:VOCAB_SIZE]))
        siblings.add(tokens[-1])
        parents.append(parent)
    return Tree(tokens, parents, kind)


def path_rows(tree: Tree, row: int) -> list[int]:
    """The rows from the root to `row`, by walking up."""
    rows = [row]
    while row:
        row = tree.parents[row - 1]
        rows.append(row)
    return rows[::-1]


def path_tokens(tree: Tree, row: int) -> tuple[int, ...]:
    return tuple(tree.tokens[r - 1] for r in path_rows(tree, row)[1:])
