"""A cache's rows as words: the widest integers that alignment and contiguity allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import torch

MAX_WORD = 8  # bytes


@dataclass(frozen=True, slots=True)
class Words:
    """The caches of a plan as the Triton kernel reads them.

    table: [num_caches, 7] int64 on their device: address, then, in words, the strides of block,
    slot, run and step inside a run, the length of a row and of a run.
    word: bytes of a word. most: words of the longest row.
    """

    table: torch.Tensor
    word: int
    most: int


def describe(caches: Sequence[torch.Tensor]) -> Words:
    """Of logical views [num_blocks, block_size, num_heads, head_size], of any strides."""
    rows = [_in_bytes(cache) for cache in caches]
    scattered = (cache.element_size() for cache in caches if cache.stride(3) != 1)
    word = gcd(MAX_WORD, *scattered, *(number for row in rows for number in row))
    table = [(address, *(n // word for n in numbers)) for address, *numbers in rows]
    device = caches[0].device
    return Words(torch.tensor(table, device=device), word, max(row[5] for row in table))


def _in_bytes(cache: torch.Tensor) -> tuple[int, ...]:
    """A row of the table; a step of 0 stands for contiguous words."""
    size, head_size = cache.element_size(), cache.shape[3]
    block, slot, head, step = (stride * size for stride in cache.stride())
    row, run = cache.shape[2] * head_size * size, head_size * size
    if step == size:
        step = 0
        if head == run:
            run = row
    return cache.data_ptr(), block, slot, head, step, row, run
