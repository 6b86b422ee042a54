"""Trees of a proposer that works on the host: the V2 runner waits for its device there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from vllm_specplus.engine.compat import VllmConfig, async_tensor_h2d
from vllm_specplus.engine.compat_v2 import InputBatch, RequestState
from vllm_specplus.engine.v2_speculator import NgramTreeSpeculator
from vllm_specplus.host_drafts import HostDrafts, Verified
from vllm_specplus.proposers.base import DraftRequest


class HostTreeSpeculator(NgramTreeSpeculator):
    """Hands a `Proposer` what the V1 engine hands it, and its trees to the device.

    Texts and verified trees are read once a step, which ends vLLM's running ahead of the device.
    """

    model_state: Any

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, req_states: RequestState
    ) -> None:
        super().__init__(vllm_config, device, req_states)
        self.drafts, self._device = HostDrafts(self.config), device

    def load_model(self, target: torch.nn.Module, model_state: Any) -> None:
        """Loads nothing. model_state: knows what was verified."""
        self.model_state = model_state

    def propose(self, input_batch: InputBatch, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The next trees as codes, int64 [num_reqs, num_nodes]."""
        if kwargs.get("dummy_run"):
            return self.nothing(input_batch)
        self.drafts.keep(self.req_states.req_id_to_index)
        most = self.config.num_nodes
        width = kwargs.get("num_speculative_tokens", most)
        num_sampled = args[4].tolist()  # behind metadata, slots and two kinds of hidden states
        requests = [*self._requests(input_batch, num_sampled, width)]
        trees = self.drafts.next_trees(requests, [*self._verified(input_batch)])
        codes = [tree.encode() + [-1] * (most - len(tree)) for tree in trees]
        on_device = async_tensor_h2d(codes, self._device, torch.int64)
        # All rows are scheduled: those of no node are filled as `core.tree.encode` does.
        filler = self.req_states.last_sampled_tokens[input_batch.idx_mapping]
        return on_device.where(on_device >= 0, filler)

    def _requests(
        self, input_batch: InputBatch, num_sampled: list[int], width: int
    ) -> Iterator[DraftRequest]:
        """Of the whole batch; none is drafted for in the middle of its prompt."""
        states, slots = self.req_states, input_batch.idx_mapping
        lens, chain_only = states.total_len.gpu[slots].tolist(), states.chain_only[slots].tolist()
        texts = states.all_token_ids.gpu[slots, : max(lens)].cpu().numpy()
        for index, req_id in enumerate(input_batch.req_ids):
            depth = self.config.num_speculative_tokens if num_sampled[index] else 0
            text = texts[index, : lens[index]]
            yield DraftRequest(req_id, text, depth, width, chain_only[index], index=index)

    def _verified(self, input_batch: InputBatch) -> Iterator[Verified]:
        drafts = input_batch.num_draft_tokens_per_req
        if drafts is None or not input_batch.num_draft_tokens:
            yield from [Verified()] * input_batch.num_reqs
            return
        paths, tokens = self.model_state.path.tolist(), self.model_state.row_tokens.tolist()
        ends = (drafts + 1).cumsum()
        for num_nodes, end, path in zip(drafts.tolist(), ends.tolist(), paths, strict=True):
            yield Verified(num_nodes, path, tokens[end - num_nodes - 1 : end])
