"""DraftTree against `growth.grow`, which takes what a beam of plain Python has looked at.

Sabotages that were caught: the second best child for the best, paths of another node than the one
above, chains that leave the best node, drafts that mean nothing kept, shapes that are ignored or
whose rows are not followed, leaves that take places of the frontier.
"""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from specplus_kernels import dispatch

from tests.core.test_graft import paths_of
from vllm_specplus.core.draft_tree import (
    DraftTree,
    level_width,
    path_masks,
)
from vllm_specplus.core.growth import MAX_FRONTIER, NUM_CHILDREN, Path, chain_paths, grow
from vllm_specplus.core.static_shape import StaticShape

Provider = Literal["reference", "triton"]
PROVIDERS: list[Provider] = ["reference", "triton"] if dispatch.HAS_TRITON else ["reference"]
VOCAB_SIZE, NUM_REQS = 50, 3
SHAPE: list[Path] = [(0,), (1,), (0, 0), (1, 0), (1, 1), (1, 1, 0), (0, 0, 0)]

LATE: list[Path] = [(0,), (0, 0), (0, 1), (0, 2), (0, 3), (0, 3, 0)]
"""Only the worst leaf goes on."""


def logits_behind(request: int, path: Path) -> torch.Tensor:
    generator = torch.Generator().manual_seed(hash((request, *path)) % 2**31)
    return 3 * torch.randn(VOCAB_SIZE, generator=generator)


def expected(
    request: int, widths: list[int], num_nodes: int, paths: list[Path] | None, blind: int
) -> list[Path]:
    """blind: a level without drafts."""
    children: dict[Path, list[tuple[int, float]]] = {}
    frontier: list[tuple[Path, Path, float]] = [((), (), 0.0)]  # path, ranks, score
    for level, width in enumerate([*widths, 0]):
        grown = []
        for path, ranks, score in frontier if level != blind else ():
            best = logits_behind(request, path).log_softmax(0).sort(descending=True)
            found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            for rank, (token, logprob) in zip(range(NUM_CHILDREN), found, strict=False):
                if paths is None or (*ranks, rank) in paths:
                    children.setdefault(path, []).append((token, logprob))
                    grown.append(((*path, token), (*ranks, rank), score + logprob))
        ranked = sorted(grown, key=lambda node: -node[2])
        inner = None if paths is None else {ranks[:-1] for ranks in paths}
        frontier = [node for node in ranked if inner is None or node[1] in inner][:width]
    return grow(lambda path: children.get(path, ()), num_nodes, len(widths) + 1).paths()


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("shape", [None, SHAPE, LATE])
@pytest.mark.parametrize(("num_levels", "room"), [(1, 4), (3, 12), (4, 5)])
def test_grows_the_likeliest_nodes(
    num_levels: int, room: int, shape: list[Path] | None, provider: Provider
) -> None:
    chain_only = torch.tensor([False, True, False])
    fits = None if shape is None else StaticShape(shape, torch.device("cpu"))
    tree, drafts = DraftTree(num_levels, chain_only, fits), torch.tensor([True, True, False])
    widths = [level_width(level, room) for level in range(1, num_levels)]
    with dispatch.force(provider):
        for level in range(num_levels):
            behind = [[tuple(path) for path in paths] for paths in tree.paths.tolist()]
            logits = torch.stack(
                [logits_behind(r, path) for r, paths in enumerate(behind) for path in paths]
            )
            above = tree.branch(logits, [*widths, 1][level], drafts if level == 1 else None)
            for r, paths in enumerate(tree.paths.tolist()):
                assert [tuple(path[:-1]) for path in paths] == [behind[r][i] for i in above[r]]
        rows = tree.rows(10)
    for r in range(NUM_REQS):
        wanted = chain_paths(num_levels) if chain_only[r] else shape
        wanted = [path for path in wanted or () if shape is None or path in shape] or shape
        paths = expected(r, widths, 10, wanted, blind=-1 if drafts[r] else 1)
        assert paths_of(rows.tokens[r].tolist(), rows.parents[r].tolist()) == paths


def test_paths_see_themselves() -> None:
    for width, length in ((3, 1), (2, 4), (8, 15)):
        words = path_masks(width, length, torch.device("cpu"))
        seen = [sum((w % 2**64) << 64 * i for i, w in enumerate(row)) for row in words.tolist()]
        rows = range(width * length)
        assert seen == [
            sum(1 << other for other in rows if other // length == row // length and other <= row)
            for row in rows
        ]


def test_widths_fit_their_room() -> None:
    assert [level_width(1, room) for room in (0, 1, 5, 127)] == [0, 1, 5, MAX_FRONTIER]
    assert [level_width(level, 12) for level in (1, 2, 3, 12, 13)] == [8, 6, 4, 1, 0]
    assert level_width(20, 1000) * 20 <= 128
