"""vLLM's own drafters beside trees: each sees the accepted path as if it had been a chain.

A drafter of vLLM reads the rows of the target's batch as one sequence, the last of them rejected.
Of a tree it gets the rows of the accepted path, 1 + depth for each request, however many nodes the
tree had: its batch, its metadata and its CUDA graphs are those of a chain.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import wrapt

from vllm_specplus.engine.compat import VllmConfig, scoped
from vllm_specplus.engine.compat_v2 import (
    BlockTables,
    CUDAGraphMode,
    InputBatch,
    InputBuffers,
    build_slot_mappings_by_layer,
)
from vllm_specplus.engine.v2_speculator import NgramTreeSpeculator


def with_depth(vllm_config: VllmConfig, depth: int) -> VllmConfig:
    """The config of a drafter that drafts `depth` tokens, however many the target verifies."""
    chain = copy(vllm_config)
    chain.speculative_config = copy(vllm_config.speculative_config)
    chain.speculative_config.num_speculative_tokens = depth
    return chain


class ChainRows:
    """Batches of chains out of batches of trees, in memory that CUDA graphs can keep."""

    def __init__(self, vllm_config: VllmConfig, depth: int, device: torch.device) -> None:
        scheduler = vllm_config.scheduler_config
        self.depth = depth
        self.buffers = InputBuffers(
            scheduler.max_num_seqs, scheduler.max_num_batched_tokens, device
        )

    def of(
        self, batch: InputBatch, path: torch.Tensor
    ) -> tuple[InputBatch, torch.Tensor, torch.Tensor]:
        """The batch of chains; for each of its rows the target's row, int64 [num_tokens]; and how
        many rows each request has less, int32 [num_reqs].

        path: int64 [num_reqs, max_path + 1], accepted tree rows, root first, padded with -1.
        """
        drafts = batch.num_draft_tokens_per_req
        assert drafts is not None
        kept = np.minimum(drafts, self.depth)
        lens = batch.num_scheduled_tokens - drafts + kept
        starts = np.concatenate([[0], lens.cumsum()]).astype(np.int32)
        owner = np.arange(batch.num_reqs).repeat(lens)
        local = np.arange(starts[-1]) - starts[owner]
        root = batch.query_start_loc_np[owner] + (lens - 1 - kept)[owner]
        step = local - (lens - 1 - kept)[owner]
        owners, roots, steps = self._upload(np.stack([owner, root, step]).astype(np.int64))
        cut = self._upload((drafts - kept).astype(np.int32))
        node = path[owners, steps.clamp(0, path.shape[1] - 1)]
        rows = roots + node.where((steps > 0) & (node > 0), steps)
        return self._batch(batch, starts, lens, kept, roots + steps, rows, cut), rows, cut

    def _upload(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.buffers.device, non_blocking=True)

    def _batch(
        self,
        batch: InputBatch,
        starts: np.ndarray,
        lens: np.ndarray,
        kept: np.ndarray,
        places: torch.Tensor,
        rows: torch.Tensor,
        cut: torch.Tensor,
    ) -> InputBatch:
        buffers, num_reqs, num_tokens = self.buffers, batch.num_reqs, int(starts[-1])
        buffers.query_start_loc.fill_(num_tokens)
        buffers.query_start_loc[: num_reqs + 1] = self._upload(starts)
        buffers.seq_lens.zero_()
        torch.sub(batch.seq_lens[:num_reqs], cut, out=buffers.seq_lens[:num_reqs])
        buffers.input_ids[:num_tokens] = batch.input_ids[rows]
        buffers.positions[:num_tokens] = batch.positions[places]
        longest = batch.seq_lens_cpu_upper_bound[:num_reqs] - torch.from_numpy(
            batch.num_scheduled_tokens - lens
        )
        return replace(
            batch,
            num_reqs_after_padding=num_reqs,
            num_scheduled_tokens=lens,
            num_tokens=num_tokens,
            num_tokens_after_padding=num_tokens,
            num_draft_tokens=int(kept.sum()),
            num_draft_tokens_per_req=kept,
            query_start_loc=buffers.query_start_loc[: num_reqs + 1],
            query_start_loc_np=starts,
            seq_lens=buffers.seq_lens[:num_reqs],
            seq_lens_cpu_upper_bound=longest,
            input_ids=buffers.input_ids[:num_tokens],
            positions=buffers.positions[:num_tokens],
            is_padding=buffers.is_padding[:num_tokens],
        )


class ChainDrafter(wrapt.ObjectProxy):
    """A drafter of vLLM, whose chains become the trunks of n-gram trees."""

    def __init__(self, drafter: Any, chains: ChainRows, ngram: NgramTreeSpeculator) -> None:
        super().__init__(drafter)
        self._self_chains = chains
        self._self_ngram = ngram

    def set_attn(
        self, model_state: Any, kv_cache_config: Any, block_tables: BlockTables, *target: Any
    ) -> None:
        """The drafter's graphs read the rows of chains, not those of the target."""
        _, target_attn_groups = target
        self.__wrapped__.set_attn(
            model_state,
            kv_cache_config,
            block_tables,
            self._self_chains.buffers,
            target_attn_groups,
        )

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Without full graphs, whose metadata must be padded to the batch that was captured."""
        piecewise = cudagraph_mode.has_piecewise_cudagraphs()
        self.__wrapped__.init_cudagraph_manager(
            CUDAGraphMode.PIECEWISE if piecewise else CUDAGraphMode.NONE
        )

    def capture(self) -> None:
        """Captures graphs without trees."""
        with scoped(self.model_state, "has_trees", False):
            self.__wrapped__.capture()

    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        *args: Any,
        num_speculative_tokens: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The next trees as codes, int64 [num_reqs, num_nodes]."""
        if input_batch.num_draft_tokens and not kwargs.get("dummy_run"):
            input_batch, rows, cut = self._self_chains.of(input_batch, self.model_state.path)
            attn_metadata, slot_mappings = self._attention(input_batch)
            last_hidden_states = last_hidden_states[rows]
            if aux_hidden_states:
                aux_hidden_states = [hidden_states[rows] for hidden_states in aux_hidden_states]
            num_rejected = num_rejected - cut
        if num_speculative_tokens is not None:
            num_speculative_tokens = min(num_speculative_tokens, self._self_chains.depth)
        chain = self.__wrapped__.propose(
            input_batch,
            attn_metadata,
            slot_mappings,
            last_hidden_states,
            aux_hidden_states,
            num_sampled,
            num_rejected,
            *args,
            num_speculative_tokens=num_speculative_tokens,
            **kwargs,
        )
        if num_speculative_tokens == 0:
            return self._self_ngram.nothing(input_batch)
        return self._self_ngram.propose_on(chain, input_batch.idx_mapping)

    def _attention(self, batch: InputBatch) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        tables, chains = self.block_tables, self._self_chains
        padded = min(
            len(chains.buffers.input_ids), chains.buffers.max_num_reqs * (1 + chains.depth)
        )
        slots = tables.compute_slot_mappings(
            batch.idx_mapping,
            batch.query_start_loc,
            batch.positions,
            max(padded, batch.num_tokens),  # a graph may be wider than the batch
        )
        with scoped(self.model_state, "has_trees", False):
            metadata = self.model_state.prepare_attn(
                batch,
                CUDAGraphMode.NONE,
                tuple(table[: batch.num_reqs] for table in tables.input_block_tables),
                slots[:, : batch.num_tokens],
                self.target_attn_groups,
                self.kv_cache_config,
            )
        return metadata, build_slot_mappings_by_layer(slots, self.kv_cache_config)
