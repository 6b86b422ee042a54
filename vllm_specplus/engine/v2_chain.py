"""vLLM's own drafters beside trees: each sees the accepted path as if it had been a chain.

A drafter of vLLM reads the rows of the target's batch as one sequence, the last of them rejected.
Of a tree it gets the rows of the accepted path, 1 + depth for each request, however many nodes the
tree had: its batch and its metadata are those of a chain. Several MTP modules get free rows too
(`drafters/windows.py`). What it drafts is a tree of its own (`drafters/trees.py`) or a chain.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
import wrapt

from vllm_specplus.core.graft import Trunk
from vllm_specplus.engine.compat import VllmConfig, async_tensor_h2d, scoped
from vllm_specplus.engine.compat_v2 import (
    CUDAGraphMode,
    InputBatch,
    build_slot_mappings_by_layer,
)
from vllm_specplus.engine.v2_speculator import NgramTreeSpeculator


def with_depth(vllm_config: VllmConfig, depth: int) -> VllmConfig:
    """The config of a drafter that drafts `depth` tokens, however many the target verifies."""
    chain = copy(vllm_config)
    chain.speculative_config = copy(vllm_config.speculative_config)
    chain.speculative_config.num_speculative_tokens = depth
    return chain


class Chains(NamedTuple):
    """A batch of chains out of a batch of trees.

    rows: int64 [num_tokens], the target's row of each of its rows. cut: int32 [num_reqs], how many
    rows each request has less, negative where it has more. committed: int64 [num_tokens] on the
    host, as `rows` up to the root, which is there for all others.
    """

    batch: InputBatch
    rows: torch.Tensor
    cut: torch.Tensor
    committed: torch.Tensor


def chain_batch(
    batch: InputBatch, path: torch.Tensor, depth: int, num_again: int, max_tokens: int
) -> Chains:
    """What a drafter sees of a batch of trees.

    path: int64 [num_reqs, max_path + 1], accepted tree rows, root first, padded with -1. depth: no
    path is longer. num_again: free rows that a decoding request gets at its end, for those that the
    drafter runs again; the first requests get them, as far as `max_tokens` in all reach.
    """
    num_reqs, scheduled = batch.num_reqs, batch.num_scheduled_tokens
    drafts = batch.num_draft_tokens_per_req
    if drafts is None:
        drafts = np.zeros_like(scheduled)
    kept = np.minimum(drafts, depth)
    chain = scheduled - drafts + kept
    free = num_again * (~batch.is_prefilling_np).astype(np.int32)
    free *= chain.sum() + free.cumsum() <= max_tokens
    lens = chain + free
    starts = np.concatenate([[0], lens.cumsum()]).astype(np.int32)
    owner = np.arange(num_reqs).repeat(lens)
    before_root = (chain - 1 - kept)[owner]
    root = batch.query_start_loc_np[owner] + before_root
    step = np.arange(starts[-1]) - starts[owner] - before_root
    step = np.minimum(step, kept[owner])
    device = path.device
    owners, roots, steps = async_tensor_h2d(np.stack([owner, root, step]), device, torch.int64)
    cut = async_tensor_h2d(drafts - kept - free, device, torch.int32)
    node = path[owners, steps.clamp(0, path.shape[1] - 1)]
    rows = roots + node.where((steps > 0) & (node > 0), steps)
    longest = batch.seq_lens_cpu_upper_bound[:num_reqs] - torch.from_numpy(drafts - kept - free)
    chains = replace(
        batch,
        num_reqs_after_padding=num_reqs,
        num_scheduled_tokens=lens,
        num_tokens=len(rows),
        num_tokens_after_padding=len(rows),
        num_draft_tokens=int(kept.sum()),
        num_draft_tokens_per_req=kept,
        query_start_loc=async_tensor_h2d(starts, device),
        query_start_loc_np=starts,
        seq_lens=batch.seq_lens[:num_reqs] - cut,
        seq_lens_cpu_upper_bound=longest,
        input_ids=batch.input_ids[rows],
        positions=batch.positions[roots + steps],
        is_padding=batch.is_padding[rows],
    )
    return Chains(chains, rows, cut, torch.from_numpy(root + np.minimum(step, 0)))


class ChainDrafter(wrapt.ObjectProxy):
    """A drafter of vLLM, whose chains or trees become the trunks of n-gram trees."""

    def __init__(self, drafter: Any, ngram: NgramTreeSpeculator) -> None:
        super().__init__(drafter)
        self._self_ngram = ngram
        self._self_depth = ngram.config.num_speculative_tokens
        self._self_again = getattr(drafter, "num_again", 0)

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Full graphs for all but a first pass that takes the target's metadata, in which graphs
        would find the trees that they were not to see."""
        drafter, piecewise = self.__wrapped__, cudagraph_mode.has_piecewise_cudagraphs()
        prefill = None
        if hasattr(drafter, "prefill_cudagraph_manager"):
            without = CUDAGraphMode.PIECEWISE if piecewise else CUDAGraphMode.NONE
            drafter.init_cudagraph_manager(without)
            prefill = drafter.prefill_cudagraph_manager
        drafter.init_cudagraph_manager(cudagraph_mode)
        if prefill is not None:
            drafter.prefill_cudagraph_manager = prefill

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
        again = self._self_again and not input_batch.is_prefilling_np.all()
        if (input_batch.num_draft_tokens or again) and not kwargs.get("dummy_run"):
            chains = self._chains(input_batch)
            input_batch, rows = chains.batch, chains.rows
            if not again:  # drafters that run rows again make metadata of their own
                attn_metadata, slot_mappings = self._attention(input_batch)
            last_hidden_states = last_hidden_states[rows]
            if aux_hidden_states:
                aux_hidden_states = [hidden_states[rows] for hidden_states in aux_hidden_states]
            num_rejected = num_rejected - chains.cut
            if kwargs.get("mm_inputs"):
                embeds, is_embed = kwargs["mm_inputs"]
                kwargs["mm_inputs"] = embeds, is_embed[chains.committed]
        ngram, width = self._self_ngram, num_speculative_tokens
        grows = getattr(self, "grows", False) and width != 0 and not kwargs.get("dummy_run")
        if num_speculative_tokens is not None:
            num_speculative_tokens = min(num_speculative_tokens, self._self_depth)
        chain = self.__wrapped__.propose(
            input_batch,
            attn_metadata,
            slot_mappings,
            last_hidden_states,
            aux_hidden_states,
            num_sampled,
            num_rejected,
            *args,
            num_speculative_tokens=1 if grows else num_speculative_tokens,
            **kwargs,
        )
        if kwargs.get("is_profile") and hasattr(self, "profile_growth"):
            self.__wrapped__.profile_growth()
        if width == 0:
            return ngram.nothing(input_batch)
        trunk = Trunk.chain(chain)
        if grows:
            trunk = self.__wrapped__.grow(input_batch, num_sampled, ngram, width)
        return ngram.propose_on(trunk, input_batch.idx_mapping[: input_batch.num_reqs])

    def _chains(self, batch: InputBatch) -> Chains:
        drafter, no_path = self.__wrapped__, batch.idx_mapping[: batch.num_reqs, None]
        path = self.model_state.path if batch.num_draft_tokens else no_path
        return chain_batch(batch, path, self._self_depth, self._self_again, drafter.max_num_tokens)

    def _attention(self, batch: InputBatch) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        tables = self.block_tables
        slots = tables.compute_slot_mappings(
            batch.idx_mapping,
            batch.query_start_loc,
            batch.positions,
            tables.slot_mappings.shape[1],  # a piecewise graph may be wider than the batch
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
