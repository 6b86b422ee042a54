"""Trees of Medusa heads on the device: the V2 runner's speculator."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad

from vllm_specplus.config import DynamicTree, StaticTree
from vllm_specplus.core.graft import Trunk
from vllm_specplus.core.growth import chain_paths
from vllm_specplus.core.products import best_products
from vllm_specplus.engine.compat import VllmConfig, init_logger
from vllm_specplus.engine.compat_v2 import InputBatch, RequestState
from vllm_specplus.engine.drafters.medusa import load_beside
from vllm_specplus.engine.v2_speculator import NgramTreeSpeculator
from vllm_specplus.proposers.heads.medusa import MedusaHeads
from vllm_specplus.proposers.medusa import NUM_CHILDREN

logger = init_logger(__name__)

_AFTER_ALL_OTHERS = -1e4
"""Log-probability of what leaves the chain of a request that gets one."""


class MedusaTreeSpeculator(NgramTreeSpeculator):
    """Drafts from the target's hidden state at the last accepted row of every request.

    Chains and static trees take candidates by rank, dynamic ones the likeliest products. n-grams
    join where they are asked for: the better half of a tree comes before them.
    """

    heads: MedusaHeads

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, req_states: RequestState
    ) -> None:
        super().__init__(vllm_config, device, req_states)
        self._vllm_config, self._device = vllm_config, device
        if self.config.verify == "typical":
            logger.warning_once(
                "speculative_verify='typical' is lossy: sampled text does not follow the model's "
                "distribution (greedy text does); 'auto' is exact."
            )
        tree, depth = self.config.tree, self.config.num_speculative_tokens
        self._num, self._by_rank = NUM_CHILDREN, None
        if not isinstance(tree, DynamicTree):
            paths = tree.paths if isinstance(tree, StaticTree) else chain_paths(depth)
            row = {path: index for index, path in enumerate([(), *paths])}
            nodes = [(len(path) - 1, path[-1], row[path[:-1]]) for path in paths]
            self._by_rank = torch.tensor(nodes, device=device).T
            self._num = max(path[-1] for path in paths) + 1

    def load_model(self, target: torch.nn.Module) -> None:
        """Loads the heads beside the target."""
        self.heads = load_beside(self.config, target, self._vllm_config, self._device)

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
        best = self.heads.best(last_hidden_states[rows], num_heads, self._num)
        slots = input_batch.idx_mapping[: len(rows)]
        return self.propose_on(self._trunk(*best, self.req_states.chain_only[slots]), slots)

    def _trunk(
        self, tokens: torch.Tensor, logprobs: torch.Tensor, chain_only: torch.Tensor
    ) -> Trunk:
        """The heads' own trees. tokens, logprobs: [num_reqs, num_heads, num], best first."""
        if self._by_rank is None:
            logprobs[:, :, 1:].masked_fill_(chain_only[:, None, None], _AFTER_ALL_OTHERS)
            grown = best_products(tokens, logprobs, self.num_nodes)
            return Trunk(grown.tokens, grown.parents, -(-self.num_nodes // 2))
        depths, ranks, parents = self._by_rank
        there = depths < tokens.shape[1]  # what is deeper is left to n-grams
        nodes = tokens[:, depths.clamp(max=tokens.shape[1] - 1), ranks].where(there, -1)
        nodes = pad(nodes, (1, 0), value=-1)
        parents = pad(parents, (1, 0), value=-1).expand_as(nodes)
        return Trunk(nodes, parents, parents.shape[1] // 2 if self.shape else parents.shape[1] - 1)
