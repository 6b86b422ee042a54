"""Verification in the V2 runner: vLLM's rejection sampler with the walk through a tree in it.

vLLM's own code processes the logits, cuts large batches into chunks, counts and collects. By the
rule `match` the target's token at each row is drawn with vLLM's noise, keyed by seed and position,
so that what is emitted is what the runner would have sampled without drafts, bit for bit. The other
rules take a trunk that its drafter sampled, and keep the distribution.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from specplus_kernels import tree_verify, verify

from vllm_specplus.core.tree import TOKEN_BITS
from vllm_specplus.engine.compat_v2 import (
    InputBatch,
    LogprobsTensors,
    RejectionSampler,
    Sampler,
    SamplerOutput,
    compute_topk_scores,
)

if TYPE_CHECKING:
    from vllm_specplus.engine.v2 import TreeModelState


class TreeVerifier(RejectionSampler):
    """Accepts a path of every tree, by the rule of the model state."""

    def __init__(self, sampler: Sampler, state: TreeModelState) -> None:
        super().__init__(sampler, state.vllm_config.speculative_config, state.device)
        self._state = state
        self._parents = self._positions = self._too_deep = torch.empty(0)
        self._expanded_idx_mapping = torch.empty(0)
        self._paths: list[torch.Tensor] = []
        self._rows_done = 0
        self._logprobs_dims: tuple[int, int] | None = None

    def __call__(
        self, logits: torch.Tensor, input_batch: InputBatch, *args: Any, **kwargs: Any
    ) -> SamplerOutput:
        """As vLLM's; the accepted paths are committed before it returns."""
        self._positions = self._state.positions[input_batch.logits_indices]
        self._too_deep = self._depths_of(input_batch) > self._state.max_depth
        self._parents = self._parents_of(input_batch)
        self._paths, self._state.row_tokens, self._rows_done = [], [], 0
        # Of the whole batch: chunks are concatenated.
        self._logprobs_dims = self.sampler.get_logprobs_dims(input_batch.idx_mapping_np)
        output = super().__call__(logits, input_batch, *args, **kwargs)
        self._state.commit(input_batch, torch.cat(self._paths))
        return output

    def _depths_of(self, input_batch: InputBatch) -> torch.Tensor:
        """Of each logits row, 0 for roots: int64 [num_logits]."""
        rows = torch.arange(len(self._positions), device=self._positions.device)
        return self._positions - self._positions[rows - input_batch.expanded_local_pos]

    def _parents_of(self, input_batch: InputBatch) -> torch.Tensor:
        """Local row of each logits row's parent, -1 for roots: int64 [num_logits]."""
        row = input_batch.expanded_local_pos.long()
        drafts = self.sampler.req_states.draft_tokens
        codes = drafts[input_batch.expanded_idx_mapping, (row - 1).clamp(min=0)]
        return torch.where(row > 0, row - 1 - (codes >> TOKEN_BITS).clamp(min=0), -1)

    def _verify(
        self,
        logits: torch.Tensor,
        draft_logits: torch.Tensor | None,
        draft_sampled: torch.Tensor,
        pos: torch.Tensor,
        cu_num_logits: torch.Tensor,
        idx_mapping: torch.Tensor,
        idx_mapping_np: np.ndarray,
        expanded_idx_mapping: torch.Tensor,
        expanded_local_pos: torch.Tensor,
        seq_lens_upper_bound_np: np.ndarray,
        verify_draft_sampled: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        self._expanded_idx_mapping = expanded_idx_mapping
        rows = slice(self._rows_done, self._rows_done + len(logits))
        self._rows_done = rows.stop
        positions = self._positions[rows]
        processed = self.sampler.apply_sampling_params(
            logits,
            expanded_idx_mapping,
            idx_mapping,
            idx_mapping_np,
            positions,
            draft_sampled,
            expanded_local_pos,
            seq_lens_upper_bound_np,
        )
        states = self.sampler.sampling_states
        temperature = states.temperature.gpu[expanded_idx_mapping]
        drafts = verify_draft_sampled.long().masked_fill(self._too_deep[rows], -1)
        keyed = (temperature, states.seeds.gpu[expanded_idx_mapping], positions)
        max_rows, parents = 1 + self.num_speculative_steps, self._parents[rows]
        if self._state.rule == "match":
            tree = (drafts, parents, cu_num_logits)
            verified, row_tokens = tree_verify(processed, *tree, *keyed, max_rows=max_rows)
            self._state.row_tokens.append(row_tokens)
        else:
            drawn: dict[str, Any] = {}
            if draft_logits is not None:
                step, depth = expanded_local_pos.long(), draft_logits.shape[1]
                q = draft_logits[expanded_idx_mapping, step.clamp(max=depth - 1)].float()
                heat = torch.where(temperature > 0, temperature, 1.0)
                drawn["draft_logits"] = q / heat[:, None]
                drawn["is_sampled"] = (step > 0) & (step <= depth)
            verified = verify(
                self._state.rule,
                processed,
                drafts,
                cu_num_logits,
                *keyed,
                max_rows=max_rows,
                parents=parents,
                allow_lossy=self._state.rule == "typical",
                **drawn,
            )
        self._paths.append(verified.path)
        return processed, verified.tokens, verified.num_emitted

    def _get_logprobs_tensors(
        self,
        sampled: torch.Tensor,
        num_sampled: torch.Tensor,
        logits: torch.Tensor,
        cu_num_logits: torch.Tensor,
        cu_num_logits_np: np.ndarray,
        max_num_logprobs: int,
    ) -> LogprobsTensors | None:
        """As vLLM's for the rows of the path, which come first among a request's rows; and with the
        tokens that a request names itself, which vLLM's leaves out."""
        if self._logprobs_dims is None:
            return None
        path, (num_logprobs, max_token_ids) = self._paths[-1], self._logprobs_dims
        # Padding repeats what the first root says of itself, so nothing waits for a count.
        on_path, roots = path >= 0, cu_num_logits[:-1, None].long()
        places = (roots + torch.arange(path.shape[1], device=path.device)).where(on_path, 0)
        order = torch.arange(len(logits), device=logits.device)
        order[places] = (roots + path).where(on_path, 0)
        tokens = torch.zeros_like(order)
        tokens[places] = sampled.where(on_path, sampled[0, 0])
        return compute_topk_scores(
            logits[order],
            num_logprobs,
            tokens,
            cu_num_logits_np.tolist(),
            self.sampler.logprob_token_ids_state,
            self._expanded_idx_mapping,
            max_token_ids,
            logits_mode=self.sampler.logprobs_mode in ("raw_logits", "processed_logits"),
        )
