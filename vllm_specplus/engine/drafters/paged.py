"""Levels of a draft over vLLM's paged KV cache, on the CPU engine.

A draft model's attention layers are vLLM's own, so that their keys and values lie in blocks of the
target's block tables and are cached, freed and preempted with them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from math import lcm
from typing import Any

import numpy as np
import torch

from vllm_specplus.engine.attention import TreeRows
from vllm_specplus.engine.compat import VllmConfig
from vllm_specplus.engine.compat_cpu import set_forward_context
from vllm_specplus.proposers.levels import Outputs, RequestRows


@dataclass(frozen=True, slots=True)
class PagedRows:
    """The rows of a level in one KV cache group, in the place of vLLM's attention metadata.

    tree: what each row attends to. slot_mapping: int64 [num_rows], where its keys and values go.
    """

    tree: TreeRows
    slot_mapping: torch.Tensor


def paged_rows(requests: Sequence[RequestRows], block_table: Any) -> PagedRows:
    """The rows of a level over a block table of the runner's, from each request's first block."""
    windows = [(rows, window) for rows in requests for window in rows.windows()]
    size, table = block_table.block_size, block_table.block_table.cpu
    blocks = [table[rows.index].roll(-rows.first // size) for rows, _ in windows]
    lengths = [len(window.masks) for _, window in windows]
    owners = torch.arange(len(windows)).repeat_interleave(torch.tensor(lengths))
    masks = np.array([mask for _, window in windows for mask in window.masks], np.uint64)
    tree = TreeRows(
        block_table=torch.stack(blocks),
        query_start_loc=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        requests=None,
        covers_all=True,
        ancestor_mask=torch.from_numpy(masks.view(np.int64))[:, None],
        positions=torch.cat([rows.positions() - rows.first for rows in requests]),
        context_lens=torch.tensor([w.context_len for _, w in windows], dtype=torch.int32),
    )
    slots = torch.arange(len(owners)) + (tree.context_lens - tree.query_start_loc[:-1])[owners]
    return PagedRows(tree, tree.block_table[owners, slots // size].long() * size + slots % size)


class PagedLayers(ABC):
    """A draft model's attention layers, and the runner's block tables of their KV cache groups.

    max_len: the longest length of the draft model, which may be less than the target's. block_size:
    KV slots after which a block begins in all groups of its layers.
    """

    block_size = 1

    def __init__(self, layers: Sequence[Any], vllm_config: VllmConfig, max_len: int) -> None:
        self.layers, self.max_len, self._vllm_config = layers, max_len, vllm_config
        self._block_tables: dict[str, Any] = {}

    def bind(self, layer_names: Sequence[str], block_table: Any) -> None:
        """Tells the runner's block table of a KV cache group."""
        own = {layer.layer_name for layer in self.layers}.intersection(layer_names)
        self._block_tables |= dict.fromkeys(own, block_table)
        self.block_size = lcm(self.block_size, *(block_table.block_size for _ in own))

    def num_slots(self, index: int) -> int:
        """KV slots of row `index` of the batch in all of the layers, up to the longest length."""
        tables = {*self._block_tables.values()}
        return min(self.max_len, *(int(t.num_blocks_per_row[index]) * t.block_size for t in tables))

    def forward(self, level: int, requests: Sequence[RequestRows]) -> Outputs:
        """See `DraftModel`."""
        tokens = torch.tensor([token for rows in requests for token in rows.tokens])
        positions = torch.cat([rows.positions() for rows in requests])
        hidden_states = torch.cat([rows.hidden_states for rows in requests])
        with self._running(requests):
            return self._run(level, tokens, positions, hidden_states)

    @abstractmethod
    def _run(
        self, level: int, tokens: torch.Tensor, positions: torch.Tensor, hidden_states: torch.Tensor
    ) -> Outputs:
        """Runs the module of a level: int64 [num_rows] twice, [num_rows, state_size]."""

    @contextmanager
    def _running(self, requests: Sequence[RequestRows]) -> Iterator[None]:
        """Inside, the layers attend for the rows of a level."""
        built = {table: paged_rows(requests, table) for table in {*self._block_tables.values()}}
        rows = {name: built[table] for name, table in self._block_tables.items()}
        slots = {name: paged.slot_mapping for name, paged in rows.items()}
        num_rows = sum(map(len, requests))
        with set_forward_context(rows, self._vllm_config, num_rows, slot_mapping=slots):
            yield
