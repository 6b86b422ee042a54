"""N-gram trees on the device: the V2 runner's speculator."""

from __future__ import annotations

from typing import Any

import torch
from specplus_kernels.ngram_match import ngram_match

from vllm_specplus.config import SpecPlusConfig
from vllm_specplus.core.tree import TOKEN_BITS
from vllm_specplus.engine.compat import VllmConfig
from vllm_specplus.engine.compat_v2 import BaseSpeculator, InputBatch, RequestState


class NgramTreeSpeculator(BaseSpeculator):
    """Trees from earlier occurrences of a request's last tokens (kernel `ngram_match`)."""

    supports_mm_inputs = False
    draft_logits = None
    chain_only: torch.Tensor  # [max_num_reqs] bool, the model state's

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, req_states: RequestState
    ) -> None:
        self.config = SpecPlusConfig.model_validate(vllm_config.additional_config["specplus"])
        self.req_states = req_states

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """Nothing to capture: there is no draft model."""

    def capture(self) -> None:
        """Nothing to capture."""

    def propose(self, input_batch: InputBatch, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The next trees as codes, int64 [num_reqs, num_nodes]."""
        slots, states = input_batch.idx_mapping, self.req_states
        grown = ngram_match(
            states.all_token_ids.gpu,
            states.total_len.gpu,
            slots,
            min_n=self.config.ngram_prompt_lookup_min,
            max_n=self.config.ngram_prompt_lookup_max,
            num_nodes=self.config.num_nodes,
            max_depth=self.config.num_speculative_tokens,
        )
        filler = states.last_sampled_tokens[slots]
        return encode(grown.tokens, grown.parents, filler, self.chain_only[slots])


def encode(
    tokens: torch.Tensor,  # [num_reqs, num_nodes + 1], -1 on padding rows
    parents: torch.Tensor,  # [num_reqs, num_nodes + 1]
    filler: torch.Tensor,  # [num_reqs, 1]
    chain_only: torch.Tensor,  # [num_reqs] bool
) -> torch.Tensor:  # [num_reqs, num_nodes] int64
    """Codes of the nodes (`Tree.encode`); what is no node, or leaves a chain, becomes filler.

    The engine schedules every row, and filler on a chain is a draft like any other: right if the
    target happens to say so.
    """
    tokens, parents = tokens[:, 1:], parents[:, 1:]
    before = torch.arange(tokens.shape[1], device=tokens.device)
    dropped = (tokens < 0) | (chain_only[:, None] & (parents != before)).cumsum(1).bool()
    codes = tokens | (before - parents) << TOKEN_BITS
    return torch.where(dropped, filler, codes)
