"""kv_commit: every cache, layout and dtype; bits are never interpreted; nothing else moves.

Seen to fail: the moves in reverse order, one head left out, padding moved.
"""

from __future__ import annotations

import pytest
import torch
from specplus_kernels import KVCommitPlan, dispatch, kv_commit

BLOCK, BLOCKS, HEADS, DIM = 32, 6, 3, 16


def vec_caches(dtype: torch.dtype, layers: int) -> list[torch.Tensor]:
    """K and V views of vLLM's CPU cache with random bits, NaN patterns among them."""
    caches = []
    for _ in range(layers):
        size = torch.tensor([], dtype=dtype).element_size()
        bits = torch.randint(0, 256, (BLOCKS, HEADS, 2 * BLOCK, DIM * size), dtype=torch.uint8)
        keys, values = bits.view(dtype).chunk(2, dim=2)
        keys = keys.view(BLOCKS, HEADS, DIM, BLOCK).permute(0, 3, 1, 2)
        caches += [keys, values.transpose(1, 2)]
    return caches


def raw(cache: torch.Tensor) -> torch.Tensor:
    """[slots, bytes] of a cache, comparable although the bits may be NaN."""
    rows = cache.contiguous().view(BLOCKS * BLOCK, HEADS * DIM)
    return rows.view(torch.uint8).clone()


def expected(before: torch.Tensor, moves: list[tuple[int, int]]) -> torch.Tensor:
    """By definition: the moves one after the other."""
    after = before.clone()
    for src, dst in moves:
        if src >= 0 and dst >= 0:
            after[dst] = after[src]
    return after


def check(caches: list[torch.Tensor], moves: list[tuple[int, int]]) -> None:
    before = [raw(cache) for cache in caches]
    src, dst = torch.tensor(moves, dtype=torch.int64).view(-1, 2).unbind(1)
    kv_commit(caches, src, dst)
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(raw(cache), expected(old, moves))


# One request whose blocks are 4, then 1: physical slots fall while logical ones rise.
CROSSING = [
    (4 * BLOCK + 30, 4 * BLOCK + 29),
    (BLOCK + 0, 4 * BLOCK + 30),
    (BLOCK + 2, 4 * BLOCK + 31),
]


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.int8],
    ids=str,
)
@pytest.mark.parametrize("layers", [1, 5])
def test_vec_layout(provider: str, dtype: torch.dtype, layers: int) -> None:
    check(vec_caches(dtype, layers), [*CROSSING, (70, 65), (72, 66), (79, 67)])


def test_plain_layout_and_many_moves(provider: str) -> None:
    cache = torch.randn(BLOCKS, BLOCK, HEADS, DIM)
    check([cache, torch.randn_like(cache)], [(slot + 9, slot) for slot in range(170)])


def test_destination_was_a_source(provider: str) -> None:
    check(vec_caches(torch.bfloat16, 2), [(10, 8), (12, 10), (15, 12)])


def test_padding_and_standing_still(provider: str) -> None:
    check(vec_caches(torch.bfloat16, 1), [(-1, -1), (5, 5), (9, 6), (-1, 3), (4, -1)])


def test_no_moves(provider: str) -> None:
    check(vec_caches(torch.bfloat16, 1), [])


def test_plan_is_reusable(provider: str) -> None:
    caches = vec_caches(torch.bfloat16, 3)
    plan, before = KVCommitPlan(caches), [raw(cache) for cache in caches]
    plan(torch.tensor([40, 44]), torch.tensor([38, 39]))
    plan(torch.tensor([[99, 0], [98, 0]])[:, 0], torch.tensor([97, 90]))  # strided sources
    moves = [(40, 38), (44, 39), (99, 97), (98, 90)]
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(raw(cache), expected(old, moves))


def test_wide_elements_run_the_reference() -> None:
    caches = vec_caches(torch.complex128, 1)
    with dispatch.force("cpu"), pytest.raises(NotImplementedError, match="16"):
        kv_commit(caches, torch.tensor([3]), torch.tensor([2]))
    check(caches, [(3, 2)])


def test_errors(provider: str) -> None:
    caches = vec_caches(torch.bfloat16, 1)
    plan, slot = KVCommitPlan(caches), torch.tensor([1])
    with pytest.raises(ValueError, match="int64"):
        plan(slot.int(), slot)
    with pytest.raises(ValueError, match="one length"):
        plan(slot, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="block size"):
        KVCommitPlan([])
    with pytest.raises((ValueError, IndexError)):
        plan(torch.tensor([BLOCKS * BLOCK]), slot)
