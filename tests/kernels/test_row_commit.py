"""row_commit: all tensors of a step in one call, against moves done one by one.

Seen to fail: the second tensor left out, tiles of moves from last to first, the last chunk of a row
left out, words twice as wide as alignment allows, one request's moves for all, the width of the
first tensor for all.
"""

from __future__ import annotations

import pytest
import torch
from specplus_kernels.row_commit import row_commit

NUM_ROWS = 70
Moves = list[tuple[int, int]]


def step_tensors() -> list[torch.Tensor]:
    """Hidden and auxiliary states, ids and positions; NaN among them, strided views among them."""
    hidden = torch.randn(NUM_ROWS, 300).bfloat16()
    hidden[::3, ::7] = torch.nan
    return [
        hidden,
        torch.randn(NUM_ROWS, 4, 10),
        torch.randn(NUM_ROWS, 40).half()[:, :11],
        torch.randn(NUM_ROWS, 41).half()[:, :8],
        torch.randn(NUM_ROWS, 40).half()[:, 2:10],
        torch.randint(0, 1 << 20, (NUM_ROWS,), dtype=torch.int32),
        torch.randint(0, 1 << 40, (NUM_ROWS,)),
        torch.randint(0, 1 << 40, (3, NUM_ROWS)).T,
    ]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(NUM_ROWS, -1).contiguous().view(torch.uint8).clone()


def check(tensors: list[torch.Tensor], moves: list[Moves], as_vector: bool = False) -> None:
    expected = [bits(tensor) for tensor in tensors]
    for rows in expected:
        for src, dst in (move for request in moves for move in request):
            if src >= 0 and dst >= 0:
                rows[dst] = rows[src]
    src_rows, dst_rows = torch.tensor(moves, dtype=torch.int64).view(len(moves), -1, 2).unbind(-1)
    if as_vector:
        src_rows, dst_rows = src_rows.flatten(), dst_rows.flatten()
    row_commit(tensors, src_rows, dst_rows)
    for tensor, rows in zip(tensors, expected, strict=True):
        assert torch.equal(bits(tensor), rows)


RAGGED = [
    [(2, 1), (4, 2), (5, 3)],
    [(-1, -1), (-1, -1), (-1, -1)],
    [(20, 20), (23, 21), (-1, 22)],
    [(NUM_ROWS - 1, NUM_ROWS - 9), (-1, -1), (-1, -1)],
]


@pytest.mark.parametrize("as_vector", [False, True])
def test_ragged_requests(gpu_provider: str, as_vector: bool) -> None:
    check(step_tensors(), RAGGED, as_vector)


@pytest.mark.parametrize("num_moves", [1, 16, 17, 35])
def test_many_moves(gpu_provider: str, num_moves: int) -> None:
    check(step_tensors(), [[(row + row // 2 + 1, row + 1) for row in range(num_moves)]])


def test_one_narrow_tensor(gpu_provider: str) -> None:
    check([torch.randint(0, 2, (NUM_ROWS,)).bool()], RAGGED)


def test_nothing_to_do(gpu_provider: str) -> None:
    check(step_tensors(), [[]])
    none = torch.zeros(0, 3, dtype=torch.int64)
    row_commit([torch.randn(NUM_ROWS, 2)], none, none)
    row_commit([torch.randn(0, 2)], torch.tensor([-1]), torch.tensor([-1]))


def test_errors(gpu_provider: str) -> None:
    rows, row = torch.randn(4, 2), torch.tensor([1])
    with pytest.raises(ValueError, match="one number of rows"):
        row_commit([rows, rows[:3]], row, row)
    with pytest.raises(ValueError, match="at least one"):
        row_commit([], row, row)
    with pytest.raises(ValueError, match="int64"):
        row_commit([rows], row.int(), row)
    with pytest.raises(ValueError, match="one shape"):
        row_commit([rows], row, row[None])
