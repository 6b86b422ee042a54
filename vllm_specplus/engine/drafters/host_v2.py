"""Trees of a proposer that works on the host: the V2 runner waits for its device there."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from typing import Any

import torch

from vllm_specplus.engine.compat import async_tensor_h2d
from vllm_specplus.engine.compat_v2 import InputBatch
from vllm_specplus.engine.v2_speculator import NgramTreeSpeculator
from vllm_specplus.host_drafts import HostDrafts, Verified
from vllm_specplus.proposers.base import DraftRequest


class HostTreeSpeculator(NgramTreeSpeculator):
    """Hands a `Proposer` what the V1 engine hands it, and its trees to the device.

    Texts and verified rows are read once a step, which ends vLLM's running ahead of the device.
    """

    @cached_property
    def drafts(self) -> HostDrafts:
        """The proposer's side."""
        return HostDrafts(self.config)

    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: Any,
        aux_hidden_states: Any,
        num_sampled: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The next trees as codes, int64 [num_reqs, num_nodes]."""
        most = self.config.num_nodes
        width, had_drafts = kwargs.get("num_speculative_tokens", most), input_batch.num_draft_tokens
        if kwargs.get("dummy_run") or not (width or had_drafts):
            return self.nothing(input_batch)
        self.drafts.keep(self.req_states.req_id_to_index.keys())
        requests = [*self._requests(input_batch, num_sampled.tolist(), width)]
        trees = self.drafts.next_trees(requests, [*self._verified(input_batch)])
        codes = [tree.encode() + [-1] * (most - len(tree)) for tree in trees]
        return async_tensor_h2d(codes, self.req_states.device, torch.int64)

    def _requests(
        self, input_batch: InputBatch, num_sampled: list[int], width: int
    ) -> Iterator[DraftRequest]:
        """Of the whole batch; none is drafted for in the middle of its prompt."""
        states, slots = self.req_states, input_batch.idx_mapping
        lens, chain_only = states.total_len.gpu[slots].tolist(), states.chain_only[slots].tolist()
        texts = states.all_token_ids.gpu[slots, : max(lens)].cpu().numpy()
        for index, req_id in enumerate(input_batch.req_ids):
            depth = self.config.num_speculative_tokens if num_sampled[index] else 0
            yield DraftRequest(req_id, texts[index, : lens[index]], depth, width, chain_only[index])

    def _verified(self, input_batch: InputBatch) -> Iterator[Verified]:
        drafts = input_batch.num_draft_tokens_per_req
        if drafts is None or not input_batch.num_draft_tokens:
            yield from [Verified()] * input_batch.num_reqs
            return
        tokens = iter(torch.cat(self.model_state.row_tokens).tolist())
        for num_nodes, path in zip(drafts.tolist(), self.model_state.path.tolist(), strict=True):
            yield Verified(num_nodes, path, [*islice(tokens, num_nodes + 1)])
