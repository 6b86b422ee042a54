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
    size = block_table.block_size
    windows = [(rows, window) for rows in requests for window in rows.windows()]
    lengths = [len(window.masks) for _, window in windows]
    firsts = torch.tensor([rows.first // size for rows, _ in windows])
    table = block_table.block_table.cpu[[rows.index for rows, _ in windows]]
    seen = torch.arange(table.shape[1]) + firsts[:, None]
    contexts = [window.context_len - rows.first for rows, window in windows]
    owners = torch.arange(len(windows)).repeat_interleave(torch.tensor(lengths))
    masks = np.array([mask for _, window in windows for mask in window.masks], np.uint64)
    tree = TreeRows(
        block_table=table.gather(1, seen.clamp(max=table.shape[1] - 1)),
        query_start_loc=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        requests=None,
        covers_all=True,
        ancestor_mask=torch.from_numpy(masks.view(np.int64))[:, None],
        positions=torch.cat([rows.positions() - rows.first for rows in requests]),
        context_lens=torch.tensor(contexts, dtype=torch.int32),
    )
    rows = torch.arange(len(owners))
    slots = rows - tree.query_start_loc[owners] + tree.context_lens[owners]
    blocks = tree.block_table[owners, slots // size].long()
    return PagedRows(tree, blocks * size + slots % size)


class PagedLayers(ABC):
    """A draft model's attention layers, and the runner's block tables of their KV cache groups.

    max_len: the longest length of the draft model, which may be less than the target's.
    """

    def __init__(self, layers: Sequence[Any], vllm_config: VllmConfig, max_len: int) -> None:
        self.layers = layers
        self._vllm_config = vllm_config
        self.max_len = max_len
        self._block_tables: dict[str, Any] = {}

    def bind(self, layer_names: Sequence[str], block_table: Any) -> None:
        """Tells the runner's block table of a KV cache group."""
        own = {layer.layer_name for layer in self.layers}.intersection(layer_names)
        self._block_tables |= dict.fromkeys(own, block_table)

    @property
    def block_size(self) -> int:
        """KV slots after which a block begins in all of the layers."""
        return lcm(*(table.block_size for table in self._block_tables.values()))

    def num_slots(self, index: int) -> int:
        """KV slots of row `index` of the batch in all of the layers, up to the longest length."""
        tables = {id(table): table for table in self._block_tables.values()}.values()
        slots = (int(table.num_blocks_per_row[index]) * table.block_size for table in tables)
        return min(self.max_len, *slots)

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
        tables = {id(table): table for table in self._block_tables.values()}
        built = {key: paged_rows(requests, table) for key, table in tables.items()}
        rows = {name: built[id(table)] for name, table in self._block_tables.items()}
        slots = {name: paged.slot_mapping for name, paged in rows.items()}
        num_rows = sum(map(len, requests))
        with set_forward_context(rows, self._vllm_config, num_rows, slot_mapping=slots):
            yield
