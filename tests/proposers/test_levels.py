"""Rows of a level: positions, and who sees whom.

Sabotages that were caught: committed rows that see the row behind them, nodes that see the node
before them instead of their parent, nodes one position too far, rows of a first block in the place
of the request's.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from vllm_specplus.engine.drafters.paged import paged_rows
from vllm_specplus.proposers.levels import RequestRows, likeliest


def rows(start: int, num_known: int, parents: list[int], depths: list[int]) -> RequestRows:
    tokens = [0] * (num_known + len(parents))
    return RequestRows(0, start, num_known, tokens, parents, depths, torch.zeros(len(tokens), 1))


def visible(each: RequestRows) -> list[list[int]]:
    """Per row the KV slots that it sees."""
    return [
        [
            *range(window.context_len),
            *(window.context_len + bit for bit in range(64) if mask >> bit & 1),
        ]
        for window in each.windows()
        for mask in window.masks
    ]


def test_committed_rows_are_causal_across_windows() -> None:
    each = rows(start=5, num_known=150, parents=[], depths=[])
    assert each.positions().tolist() == list(range(5, 155))
    assert visible(each) == [list(range(position + 1)) for position in range(5, 155)]


def test_nodes_see_what_is_committed_and_their_path() -> None:
    each = rows(start=4, num_known=2, parents=[-1, -1, 0, 0, 1, 3], depths=[1, 1, 2, 2, 2, 3])
    assert each.positions().tolist() == [4, 5, 6, 6, 7, 7, 7, 8]
    committed = [0, 1, 2, 3, 4, 5]
    paths = [[6], [7], [6, 8], [6, 9], [7, 10], [6, 9, 11]]
    assert visible(each)[2:] == [committed + path for path in paths]


def test_rows_lie_where_the_target_has_theirs_and_see_their_first_block_first() -> None:
    """Blocks before it may be those of other requests too, whose rows are not to be overwritten."""
    table = torch.tensor([[0, 1, 6, 9], [3, 7, 5, 2]], dtype=torch.int32)
    blocks = SimpleNamespace(block_size=4, block_table=SimpleNamespace(cpu=table))
    each = rows(start=9, num_known=2, parents=[-1, 0], depths=[1, 2])
    paged = paged_rows([replace(each, index=1, first=4), replace(each, first=8)], blocks)
    assert paged.slot_mapping.tolist() == [21, 22, 23, 8, 25, 26, 27, 36]
    assert [row[:2] for row in paged.tree.block_table.tolist()] == [[7, 5]] * 2 + [[6, 9]] * 2
    assert paged.tree.context_lens.tolist() == [5, 7, 1, 3]
    assert paged.tree.positions.tolist() == [5, 6, 7, 8, 1, 2, 3, 4] and each.positions()[0] == 9


@pytest.mark.parametrize("num_tokens", [5, 300, 1000, 1024, 4096, 32_001])
def test_the_likeliest_tokens(num_tokens: int) -> None:
    """In groups and without; seen to fail: fewer groups than tokens."""
    logits, vocab = torch.randn(3, num_tokens), torch.randperm(num_tokens)
    best, index = logits.softmax(1).topk(min(8, num_tokens))
    for found, tokens, probs in zip(likeliest(logits, 8, vocab), index, best, strict=True):
        assert [*found] == vocab[tokens].tolist()
        assert [*found.values()] == pytest.approx(probs.tolist(), rel=1e-4)


def test_nodes_alone() -> None:
    each = rows(start=3, num_known=0, parents=[-1, 0], depths=[1, 2])
    assert each.positions().tolist() == [3, 4]
    assert visible(each) == [[0, 1, 2, 3], [0, 1, 2, 3, 4]]
