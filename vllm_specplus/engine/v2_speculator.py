"""N-gram trees on the device: the V2 runner's speculator."""

from __future__ import annotations

from typing import Any

import torch
from specplus_kernels.ngram_match import ngram_match

from vllm_specplus.config import SpecPlusConfig
from vllm_specplus.core.graft import Trunk, graft
from vllm_specplus.core.static_shape import StaticShape
from vllm_specplus.core.tree import encode
from vllm_specplus.engine.compat import VllmConfig
from vllm_specplus.engine.compat_v2 import BaseSpeculator, InputBatch, RequestState
from vllm_specplus.shapes import MAX_NODES, StaticTree


class NgramTreeSpeculator(BaseSpeculator):
    """Trees from earlier occurrences of a request's last tokens (kernel `ngram_match`).

    shape: of static trees. num_nodes: what is drafted, of which a shape keeps what fits.
    model_state: knows what was verified.
    """

    model_state: Any
    supports_mm_inputs = False
    draft_logits = None

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, req_states: RequestState
    ) -> None:
        self.config = SpecPlusConfig.model_validate(vllm_config.additional_config["specplus"])
        self.req_states = req_states
        tree = self.config.tree
        self._matches = any(spec.name == "ngram" for spec in self.config.methods)
        self.shape = StaticShape(tree.paths, device) if isinstance(tree, StaticTree) else None
        self.num_nodes = self.config.num_nodes if self.shape is None else MAX_NODES
        req_states.chain_only = torch.zeros(
            req_states.max_num_reqs, dtype=torch.bool, device=device
        )

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """Nothing to capture: there is no draft model."""

    def capture(self) -> None:
        """Nothing to capture."""

    def propose(self, input_batch: InputBatch, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The next trees as codes, int64 [num_reqs, num_nodes]."""
        if kwargs.get("num_speculative_tokens") == 0:
            return self.nothing(input_batch)
        return self.propose_on(None, input_batch.idx_mapping)

    def nothing(self, input_batch: InputBatch) -> torch.Tensor:
        """What is proposed where nothing pays."""
        shape = (input_batch.num_reqs, self.config.num_nodes)
        return torch.full(shape, -1, dtype=torch.int64, device=input_batch.idx_mapping.device)

    def propose_on(self, trunk: Trunk | None, slots: torch.Tensor) -> torch.Tensor:
        """The same around trees that another drafter gave, or those alone."""
        states, max_depth = self.req_states, self.config.num_speculative_tokens
        rows = None if trunk is None else trunk[:2]
        if self._matches:
            grown = ngram_match(
                states.all_token_ids.gpu,
                states.total_len.gpu,
                slots,
                min_n=self.config.ngram_prompt_lookup_min,
                max_n=self.config.ngram_prompt_lookup_max,
                num_nodes=self.num_nodes,
                max_depth=max_depth,
            )
            rows = grown[:2]
            if trunk is not None:
                # A request that may not branch keeps the drafter's chain, down to its end.
                branching = grown.tokens.masked_fill(states.chain_only[slots][:, None], -1)
                rows = graft(trunk, (branching, grown.parents), self.num_nodes, max_depth)[:2]
        assert rows is not None
        tokens, parents = rows
        if self.shape is not None:
            tokens, parents = self.shape.fit(tokens, parents)
        return encode(tokens, parents, states.last_sampled_tokens[slots], states.chain_only[slots])
