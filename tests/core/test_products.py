"""The best products against `growth.grow`, which picks nodes one by one.

Sabotages that were caught: fewer kept of a level than there are nodes, parents of the level before,
scores of one level alone.
"""

from __future__ import annotations

import doctest
from functools import partial

import pytest
import torch

from vllm_specplus.core import products as module
from vllm_specplus.core.growth import Path, grow
from vllm_specplus.core.products import best_products


def _level(levels: list[list[tuple[int, float]]], path: Path) -> list[tuple[int, float]]:
    return levels[len(path)]


@pytest.mark.parametrize(
    ("num_reqs", "depth", "num", "num_nodes"), [(3, 4, 10, 16), (2, 3, 10, 40), (1, 1, 5, 8)]
)
def test_the_best_nodes(num_reqs: int, depth: int, num: int, num_nodes: int) -> None:
    logits = torch.randn(num_reqs, depth, 50, generator=torch.Generator().manual_seed(0))
    logprobs, tokens = (2 * logits).log_softmax(-1).topk(num)
    rows = best_products(tokens, logprobs, num_nodes)
    for request in range(num_reqs):
        levels = [
            list(zip(*level, strict=True))
            for level in zip(tokens[request].tolist(), logprobs[request].tolist(), strict=True)
        ]
        grown = grow(partial(_level, levels), num_nodes, depth)
        end = len(grown) + 1
        assert rows.num_nodes[request] == len(grown)
        assert rows.tokens[request, 1:end].tolist() == list(grown.tokens)
        assert rows.parents[request, 1:end].tolist() == list(grown.parents)


def test_examples() -> None:
    assert doctest.testmod(module).attempted == 3
