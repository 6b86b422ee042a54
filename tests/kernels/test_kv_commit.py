"""kv_commit: every cache, layout and dtype; bits are never interpreted; nothing else moves.

Seen to fail: the moves in reverse order, one head left out, padding moved, a
pair's or a tile's strides exchanged; in Triton: tiles of
moves from last to first, the last chunk of a row left out, words wider than a view's alignment or
its elements, the strides of heads and steps exchanged, one group's moves for all, a shared layer
moved twice. The interpreter runs one thread, so that the barrier between reads and writes is
missing shows only on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from specplus_kernels import KVCommitPlan, dispatch, kv_commit
from specplus_kernels.tiled import plain

from tests.kernels.attention_case import amx_keys, amx_values
from tests.kernels.conftest import DEVICE

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


def amx_caches(layers: int) -> list[torch.Tensor]:
    """The same, as vLLM packs them for AMX."""
    caches = vec_caches(torch.bfloat16, layers)
    return [(amx_keys, amx_values)[i % 2](cache) for i, cache in enumerate(caches)]


def raw(cache: torch.Tensor) -> torch.Tensor:
    """[slots, bytes] of a cache, comparable although the bits may be NaN."""
    return (
        plain(cache)
        .clone(memory_format=torch.contiguous_format)
        .flatten(0, 1)
        .flatten(1)
        .view(torch.uint8)
    )


def expected(before: torch.Tensor, moves: list[tuple[int, int]]) -> torch.Tensor:
    """By definition: the moves one after the other."""
    after = before.clone()
    for src, dst in moves:
        if src >= 0 and dst >= 0:
            after[dst] = after[src]
    return after


def check(caches: list[torch.Tensor], moves: list[tuple[int, int]], num_reqs: int = 0) -> None:
    """`num_reqs` > 0: as a matrix of that many requests."""
    before = [raw(cache) for cache in caches]
    slots = torch.tensor(moves, dtype=torch.int64).view(-1, 2)
    src, dst = (slots.view(num_reqs, -1, 2) if num_reqs else slots).unbind(-1)
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
def test_vec_layout(any_provider: str, dtype: torch.dtype, layers: int) -> None:
    check(vec_caches(dtype, layers), [*CROSSING, (70, 65), (72, 66), (79, 67)])


@pytest.mark.parametrize("layers", [1, 5])
def test_amx_layout(provider: str, layers: int) -> None:
    check(amx_caches(layers), [*CROSSING, (70, 65), (72, 66), (79, 67)])
    with dispatch.force("triton"), pytest.raises(NotImplementedError, match="tiles"):
        kv_commit(amx_caches(1), torch.tensor([3]), torch.tensor([2]))


def test_plain_layout_and_many_moves(any_provider: str) -> None:
    cache = torch.randn(BLOCKS, BLOCK, HEADS, DIM)
    check([cache, torch.randn_like(cache)], [(slot + 9, slot) for slot in range(170)])


def test_matrix_of_ragged_requests(any_provider: str) -> None:
    empty, standing = [(-1, -1)] * 3, [(150, 150), (-1, -1), (-1, -1)]
    last = BLOCKS * BLOCK - 1
    full = [(last - 2, last - 4), (last - 1, last - 3), (last, last - 2)]
    check(
        vec_caches(torch.bfloat16, 2), [*CROSSING, *empty, (9, 7), *empty[:2], *standing, *full], 5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_gpu_layouts(any_provider: str, dtype: torch.dtype) -> None:
    """The V2 runner's cache with K and V in one row, by heads and by slots, and split in two."""
    bits = torch.randint(0, 256, (4, BLOCKS, HEADS, BLOCK, 4 * DIM), dtype=torch.uint8)
    by_heads, by_slots, keys_and_values = bits.view(dtype)[:3]
    by_slots = by_slots.view(BLOCKS, BLOCK, HEADS, -1)
    check([by_heads.transpose(1, 2), by_slots], CROSSING)
    check([*keys_and_values.transpose(1, 2).chunk(2, dim=3)], CROSSING)


def test_latent_cache(any_provider: str) -> None:
    """MLA: rows of 576 elements without heads, longer than a program's chunk at 16 moves."""
    check([torch.randn(BLOCKS, BLOCK, 576)], [(slot + 9, slot) for slot in range(40, 57)])


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_unaligned_and_scattered_views(any_provider: str, offset: int) -> None:
    caches = torch.randn(BLOCKS, BLOCK, HEADS, 2 * DIM + 8).bfloat16()
    check([caches[..., offset : offset + DIM], caches[..., offset + DIM :]], CROSSING)
    check([torch.randn(BLOCKS, BLOCK, HEADS, 8 * DIM)[..., ::8]], CROSSING)


def test_shared_layers_move_once(any_provider: str) -> None:
    [keys, values] = vec_caches(torch.bfloat16, 1)
    check([keys, values, keys, values], [(10, 8), (11, 10), (12, 11)])


def test_destination_was_a_source(any_provider: str) -> None:
    check(vec_caches(torch.bfloat16, 2), [(10, 8), (12, 10), (15, 12)])


def test_padding_and_standing_still(any_provider: str) -> None:
    check(vec_caches(torch.bfloat16, 1), [(-1, -1), (5, 5), (9, 6), (-1, 3), (4, -1)])


def test_no_moves(any_provider: str) -> None:
    check(vec_caches(torch.bfloat16, 1), [])


def test_plan_is_reusable(any_provider: str) -> None:
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
    with pytest.raises(ValueError, match="one shape"):
        plan(slot, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="one address"):
        KVCommitPlan([caches[0], caches[0][..., :4]])
    with pytest.raises(ValueError, match="block size"):
        KVCommitPlan([])
    with pytest.raises((ValueError, IndexError)):
        plan(torch.tensor([BLOCKS * BLOCK]), slot)


@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="no Triton in this installation")
def test_slots_out_of_bounds_are_padding_on_a_gpu() -> None:
    cache = torch.randn(BLOCKS, BLOCK, HEADS, DIM, device=DEVICE)
    before, end = raw(cache), BLOCKS * BLOCK
    src, dst = torch.tensor([[end, 5, 9], [3, end, 7]], device=DEVICE)
    with dispatch.force("triton"):
        kv_commit([cache], src, dst)
    assert torch.equal(raw(cache), expected(before, [(9, 7)]))
