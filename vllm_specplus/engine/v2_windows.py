"""vLLM's chain of several MTP modules, right for accepted paths that were not its own drafts."""

from __future__ import annotations

from typing import Any

import torch

from vllm_specplus.engine.compat import VllmConfig, scoped
from vllm_specplus.engine.compat_v2 import (
    CUDAGraphMode,
    InputBatch,
    MultiModuleMTPSpeculator,
)
from vllm_specplus.engine.drafters.modules import ModulesSpeculator, has_several_modules
from vllm_specplus.engine.drafters.trees import Ends, GrowingMixin, init_growing
from vllm_specplus.engine.v2_chain import with_depth


class WindowsSpeculator(GrowingMixin, MultiModuleMTPSpeculator):
    """vLLM's speculator for several MTP modules, which runs earlier rows again.

    All modules run over the same rows of a request, its window; module k has, at position p, token
    p + k. So what it keeps of the last rows of a window was drafted: it is final once that token is
    known. vLLM runs as many of these rows again as tokens were rejected, less one, which is right
    where the accepted ones are its own chain. Here all are run again that may have seen a draft.

    num_again: how many these are; as far as the last module's window reaches into drafts.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.num_again = self.num_speculative_steps - 1
        # vLLM keeps the last rows of each window, and after a short one older rows beside them.
        self._num_cached = torch.zeros(self.max_num_reqs, dtype=torch.int64, device=device)

    @property
    def attn_vllm_config(self) -> VllmConfig:
        """By which attention tells decoding requests by their length, with the longest window."""
        return with_depth(self.vllm_config, self.num_speculative_steps + self.num_again)

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Graphs for the longest window."""
        longest = self.num_speculative_steps + self.num_again
        with scoped(self, "num_speculative_steps", longest):
            super().init_cudagraph_manager(cudagraph_mode)

    def _ends(self, level: int, num_reqs: int) -> Ends:
        """The rows of a level are final up to one less with each level."""
        lasts, starts = self.last_token_indices, self.input_buffers.query_start_loc
        begins = self._last_positions[:num_reqs] + 1 - level
        is_there = lasts[:num_reqs] + 1 - level >= starts[:num_reqs]
        return Ends(begins, self._level_states[level - 1, :num_reqs], is_there)

    def _module(self, level: int) -> dict[str, int]:
        return {"spec_module_idx": level}

    def _prepare_inputs(
        self,
        target_hidden_states: torch.Tensor,
        input_batch: InputBatch,
        num_tokens: int,
        max_query_len: int,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,
        mm_inputs: tuple[list[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """A window is rows to run again, then those whose hidden states are new, then rows that
        nobody reads: `num_rejected` are of the first or of the last kind."""
        buffers, num_reqs, most = self.input_buffers, input_batch.num_reqs, self.num_again
        slots = input_batch.idx_mapping[:num_reqs]
        ends = input_batch.query_start_loc[: num_reqs + 1].long()
        starts, lens = ends[:-1], ends.diff()
        first, num_new = input_batch.positions[starts], lens - num_rejected
        again = num_rejected.minimum(self._num_cached[slots])
        self._num_cached[slots] = (again + num_new).clamp(max=most)

        row = torch.arange(num_tokens, device=slots.device)
        owner = torch.repeat_interleave(row[:num_reqs], lens, output_size=num_tokens)
        step = row - (starts + again)[owner]  # from the first new row on
        last = num_new[owner] - 1
        source = (starts[owner] + step).clamp(0, num_tokens - 1)
        earlier, cached = step < 0, (slots[owner], step.clamp(-most, -1))

        sampled, known = num_sampled > 0, next_prefill_tokens[:, slots]
        next_ids = last_sampled.flatten()[slots].where(sampled, known[0])
        ids = input_batch.input_ids[(source + 1).clamp(max=num_tokens - 1)]
        ids = ids.where(step < last, next_ids[owner])
        buffers.input_ids[:num_tokens] = self.cached_draft_input_ids[cached].where(earlier, ids)
        buffers.positions[:num_tokens] = first[owner] + step.minimum(last)
        states = self.cached_target_hidden_states[cached]
        new_states = target_hidden_states[source]
        self.hidden_states[:num_tokens] = states.where(earlier[:, None], new_states)
        if self.inputs_embeds is not None:
            assert self.cached_draft_input_embeds is not None
            embeds, is_embed = mm_inputs or (None, None)
            images = {"multimodal_embeddings": embeds, "is_multimodal": is_embed}
            embeds = self.model.embed_input_ids(buffers.input_ids[:num_tokens], **images)
            before = self.cached_draft_input_embeds[cached]
            self.inputs_embeds[:num_tokens] = before.where(earlier[:, None], embeds)

        later = known[1 : most + 1].T.where(~sampled[:, None], -1)
        self.draft_input_id_overrides[:num_reqs] = later
        for buffer, values, padding in (
            (self.last_token_indices, starts + again + num_new - 1, 0),
            (buffers.seq_lens, first - again + lens, 0),
            (buffers.query_start_loc[1:], ends[1:], num_tokens),
        ):
            buffer[:num_reqs] = values
            buffer[num_reqs:] = padding


class ModuleWindowsSpeculator(WindowsSpeculator, ModulesSpeculator):
    """The same for a target's own modules."""


def init_trunk(vllm_config: VllmConfig, *args: Any) -> Any:
    """vLLM's `init_speculator` for what grows trees, whose accepted path may leave its chain."""
    options = vllm_config.speculative_config
    if not options.use_multi_module_mtp():
        return init_growing(vllm_config, *args)
    own = has_several_modules(options)
    return (ModuleWindowsSpeculator if own else WindowsSpeculator)(vllm_config, args[0])
