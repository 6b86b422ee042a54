"""StaticShape against `growth.prune`, which names paths in plain Python.

Sabotages that were caught: ranks counted over padding, ranks beyond the shape taken for its last,
one level too few, a node kept whose parent is not in the shape.
"""

from __future__ import annotations

import doctest

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.core.test_graft import paths_of
from vllm_specplus.core import static_shape as module
from vllm_specplus.core.growth import Candidates, prune
from vllm_specplus.core.static_shape import StaticShape

WIDTH = 12
SHAPES = [
    [(0,)],
    [(0,), (0, 0), (0, 0, 0)],
    [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)],
    [(0,), (1,), (2,), (2, 0), (2, 1), (2, 1, 0), (2, 1, 0, 0)],
]


@given(
    st.lists(st.lists(st.integers(0, WIDTH), max_size=WIDTH), min_size=1, max_size=3),
    st.sampled_from(SHAPES),
)
def test_keeps_what_prune_keeps(batch: list[list[int]], paths: list[tuple[int, ...]]) -> None:
    trees = [[min(parent, i) for i, parent in enumerate(parents)] for parents in batch]
    tokens = [list(range(100, 100 + len(parents))) for parents in trees]
    padded_tokens = torch.tensor([[-1, *t, *[-1] * (WIDTH - len(t))] for t in tokens])
    padded_parents = torch.tensor([[-1, *p, *[0] * (WIDTH - len(p))] for p in trees])
    got = StaticShape(paths, torch.device("cpu")).fit(padded_tokens, padded_parents)
    assert all(x.shape == (len(batch), len(paths) + 1) for x in got)
    rows = zip(got[0].tolist(), got[1].tolist(), strict=True)
    for t, p, (out_tokens, out_parents) in zip(tokens, trees, rows, strict=True):
        kept = prune(Candidates(t, p, [1.0] * len(t)), paths)
        expected = paths_of([-1, *kept.tokens], [-1, *kept.parents])
        assert sorted(paths_of(out_tokens, out_parents)) == sorted(expected)


def test_docs() -> None:
    assert doctest.testmod(module).failed == 0
