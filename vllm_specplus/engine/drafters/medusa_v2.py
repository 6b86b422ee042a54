"""Trees of Medusa heads on the device: the V2 runner's speculator."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad

from vllm_specplus.config import DynamicTree, StaticTree
from vllm_specplus.core.growth import chain_paths
from vllm_specplus.core.products import best_products
from vllm_specplus.engine.compat import VllmConfig
from vllm_specplus.engine.compat_v2 import InputBatch, RequestState
from vllm_specplus.engine.drafters.medusa import load_beside
from vllm_specplus.engine.v2_speculator import NgramTreeSpeculator
from vllm_specplus.proposers.heads.medusa import MedusaHeads
from vllm_specplus.proposers.medusa import NUM_CHILDREN


class MedusaTreeSpeculator(NgramTreeSpeculator):
    """Drafts from the target's hidden state at the last accepted row of every request.

    Chains and static trees take candidates by rank, dynamic ones the likeliest products. With
    n-grams the heads' chain is the trunk of an n-gram tree.
    """

    heads: MedusaHeads
    model_state: Any

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, req_states: RequestState
    ) -> None:
        super().__init__(vllm_config, device, req_states)
        self._vllm_config, self._device = vllm_config, device
        self._num, tree, depth = NUM_CHILDREN, self.config.tree, self.config.num_speculative_tokens
        self._by_rank: torch.Tensor | None = None
        if not isinstance(tree, DynamicTree):
            paths = tree.paths if isinstance(tree, StaticTree) else chain_paths(depth)
            row = {path: index for index, path in enumerate([(), *paths])}
            nodes = [(len(path) - 1, path[-1], row[path[:-1]]) for path in paths]
            self._by_rank = torch.tensor(nodes, device=device).T
            self._num = max(path[-1] for path in paths) + 1

    def load_model(self, target: torch.nn.Module, model_state: Any) -> None:
        """Loads the heads beside the target. model_state: knows the accepted paths."""
        self.heads = load_beside(self.config, target, self._vllm_config, self._device)
        self.model_state = model_state

    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The next trees as codes, int64 [num_reqs, num_nodes]."""
        if kwargs.get("num_speculative_tokens") == 0:
            return self.nothing(input_batch)
        rows = input_batch.logits_indices[input_batch.cu_num_logits[:-1].long()]
        if input_batch.num_draft_tokens and not kwargs.get("dummy_run"):
            rows = rows + self.model_state.path.amax(1)
        num_heads = min(self.heads.config.num_heads, self.config.num_speculative_tokens)
        slots = input_batch.idx_mapping
        tokens, logprobs = self.heads.best(last_hidden_states[rows], num_heads, self._num)
        if self.config.method != "medusa":
            return self.propose_on(tokens[:, :, 0], slots)
        if self._by_rank is None:
            grown = best_products(tokens, logprobs, self.config.num_nodes)
            return self.encoded(grown.tokens, grown.parents, slots)
        depths, ranks, parents = self._by_rank
        nodes = pad(tokens[:, depths, ranks], (1, 0), value=-1)
        return self.encoded(nodes, pad(parents, (1, 0), value=-1).expand_as(nodes), slots)
