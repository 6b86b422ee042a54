"""The V2 engine: token trees in vLLM's V2 model runner, on CPUs so far.

GPUs are refused at start-up: what they need on top (attention over their backends, CUDA graphs) is
not built.

vLLM's step runs unchanged. Trees live on the device, encoded in the runner's own draft tokens by
request slot (`Tree.encode`, kernel `tree_stage`), so under async scheduling the host never sees
them and nothing of ours needs to follow a request through preemption. The round hangs on three of
vLLM's objects: a model state stages the tree and commits the accepted path, a rejection sampler
verifies, a speculator proposes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from specplus_kernels.kv_commit import KVCommitPlan
from specplus_kernels.tree_stage import tree_stage

from vllm_specplus.config import SpecPlusConfig
from vllm_specplus.core.stats import SpecStats
from vllm_specplus.core.tree import WORD_BITS
from vllm_specplus.engine.attention import TreeCPUAttentionBackend, TreeRows, kv_views
from vllm_specplus.engine.compat import (
    AttentionBackendEnum,
    KVCacheConfig,
    SamplingParams,
    VllmConfig,
    registered_backend,
    scoped,
)
from vllm_specplus.engine.compat_v2 import (
    BlockTables,
    CPUModelRunner,
    DefaultModelState,
    GPUModelRunner,
    InputBatch,
    RequestState,
    Sampler,
    model_runner,
    resolve_model_state_cls,
)
from vllm_specplus.engine.v2_speculator import NgramTreeSpeculator
from vllm_specplus.engine.v2_verifier import TreeVerifier
from vllm_specplus.errors import not_built


class TreeModelState(DefaultModelState):
    """vLLM's model state, which stages the trees of a step and commits what was accepted."""

    def __init__(self, vllm_config: VllmConfig, *args: Any) -> None:
        super().__init__(vllm_config, *args)
        config = SpecPlusConfig.model_validate(vllm_config.additional_config["specplus"])
        num_nodes = config.num_nodes
        words = num_nodes // WORD_BITS + 1
        on_device: dict[str, Any] = {"dtype": torch.int64, "device": self.device}
        self.positions = torch.zeros(self.max_num_tokens, **on_device)
        self._ancestor_mask = torch.zeros(self.max_num_tokens, words, **on_device)
        self._context_lens = torch.zeros(self.max_num_reqs, dtype=torch.int32, device=self.device)
        self.chain_only = torch.zeros(self.max_num_reqs, dtype=torch.bool, device=self.device)
        self._stats = SpecStats(num_nodes)
        self._num_accepted = torch.zeros(num_nodes, **on_device)  # per depth - 1
        self._slot_mappings: torch.Tensor | None = None
        self._commit_plans: list[KVCommitPlan] = []
        self._req_states: RequestState | None = None

    # Start-up and requests.

    def custom_sampler(self, sampler: Sampler) -> tuple[Sampler, TreeVerifier]:
        self._req_states = sampler.req_states
        return sampler, TreeVerifier(sampler, self)

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, block_tables: BlockTables
    ) -> None:
        super().initialize_kv_cache(kv_cache_config, block_tables)
        layers = self.vllm_config.compilation_config.static_forward_context
        self._commit_plans = [
            KVCommitPlan([v for name in group.layer_names for v in kv_views(layers[name].kv_cache)])
            for group in kv_cache_config.kv_cache_groups
        ]

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        self.chain_only[req_index] = needs_chain(new_req_data.sampling_params)

    # Stage.

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: Any,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: Any,
        kv_cache_config: KVCacheConfig,
        for_capture: bool = False,
        ubatch_idx: int = 0,
    ) -> dict[str, Any]:
        metadata = super().prepare_attn(
            input_batch,
            cudagraph_mode,
            block_tables,
            slot_mappings,
            attn_groups,
            kv_cache_config,
            for_capture,
            ubatch_idx,
        )
        assert not for_capture, "no CUDA graphs yet"
        self._slot_mappings = slot_mappings
        num_rows = input_batch.num_tokens_after_padding
        self.positions[:num_rows].copy_(input_batch.positions)
        if input_batch.num_draft_tokens:
            self._stage(input_batch)
            rows = self._tree_rows(input_batch)
            for group in {id(group): group for group in metadata.values()}.values():
                group.tree = rows
        return metadata

    def _stage(self, input_batch: InputBatch) -> None:
        assert self._req_states is not None
        num_reqs, num_rows = input_batch.num_reqs, input_batch.num_tokens
        tree_stage(
            self._req_states.draft_tokens[input_batch.idx_mapping],
            input_batch.query_start_loc[: num_reqs + 1],
            input_batch.cu_num_logits,
            self.positions[:num_rows],
            self._ancestor_mask[:num_rows],
        )

    def _tree_rows(self, input_batch: InputBatch) -> TreeRows:
        """Requests whose rows are a tree and nothing else; prompts stay with causal attention."""
        padded, num_rows = len(input_batch.seq_lens), input_batch.num_tokens_after_padding
        query_start_loc = input_batch.query_start_loc[: padded + 1]
        context_lens = self._context_lens[:padded]
        torch.sub(input_batch.seq_lens, query_start_loc.diff(), out=context_lens)
        query_lens = np.diff(input_batch.query_start_loc_np[: input_batch.num_reqs + 1])
        is_tree = query_lens == 1 + input_batch.num_draft_tokens_per_req
        covers_all = bool(np.all(is_tree))
        requests = None
        if not covers_all:
            chosen = torch.from_numpy(np.flatnonzero(is_tree).astype(np.int32))
            requests = chosen.to(self.device, non_blocking=True)
        return TreeRows(
            requests=requests,
            covers_all=covers_all,
            ancestor_mask=self._ancestor_mask[:num_rows],
            positions=self.positions[:num_rows],
            context_lens=context_lens,
        )

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        inputs = super().prepare_inputs(input_batch, req_states)
        return self._with_positions(inputs, input_batch.num_tokens_after_padding)

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        return self._with_positions(super().prepare_dummy_inputs(num_reqs, num_tokens), num_tokens)

    def _with_positions(self, inputs: dict[str, Any], num_tokens: int) -> dict[str, Any]:
        assert "positions" not in inputs, "M-RoPE positions are refused at start-up"
        return inputs | {"positions": self.positions[:num_tokens]}

    # Commit.

    def commit(self, input_batch: InputBatch, path: torch.Tensor) -> None:
        """Moves the KV of accepted nodes to the slots behind their root.

        path: int64 [num_reqs, max_path + 1], tree rows, root first, padded with -1.
        """
        drafted = input_batch.num_draft_tokens_per_req
        self._stats.num_rounds += input_batch.num_reqs
        self._stats.num_drafts += int(np.count_nonzero(drafted))
        self._stats.num_draft_tokens += input_batch.num_draft_tokens
        self._num_accepted += (path[:, 1:] >= 0).sum(0)
        roots = input_batch.logits_indices[input_batch.cu_num_logits[:-1].long()]
        target = torch.arange(path.shape[1], device=self.device)
        moved = path > target  # padding is negative, and no accepted node lies before its place
        assert self._slot_mappings is not None
        for plan, slots in zip(self._commit_plans, self._slot_mappings, strict=True):
            source_slots = slots[(roots[:, None] + path).where(moved, 0)]
            target_slots = slots[(roots[:, None] + target).where(moved, 0)]
            plan(source_slots.where(moved, -1), target_slots.where(moved, -1))

    def stats(self) -> SpecStats:
        """Counters of the rounds with drafts so far; waits for the device."""
        accepted = self._num_accepted.tolist()
        self._stats.num_accepted_tokens_per_pos = accepted
        return self._stats


def needs_chain(params: SamplingParams | None) -> bool:
    """Whether vLLM reads a request's rows as one sequence, which only a chain of drafts is."""
    return params is not None and bool(
        params.structured_outputs is not None
        or params.bad_words
        or params.thinking_token_budget is not None
        or params.repetition_penalty != 1
        or params.frequency_penalty
        or params.presence_penalty
    )


def init_tree_state(vllm_config: VllmConfig, model: torch.nn.Module, *args: Any) -> TreeModelState:
    """vLLM's `init_model_state` for trees.

    Raises NotBuiltError for a model whose state is not vLLM's default one.
    """
    cls = resolve_model_state_cls(vllm_config, model)
    if cls is not DefaultModelState:
        raise not_built(
            "model",
            vllm_config.model_config.model,
            f"keeps its state in {cls.__name__}, which trees were not built for",
            "use speculative_tree='chain'",
        )
    return TreeModelState(vllm_config, model, *args)


class _TreeRunner(GPUModelRunner):
    """Gives vLLM's V2 runner our speculator, model state and attention."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        with scoped(model_runner, "init_speculator", NgramTreeSpeculator):
            super().__init__(vllm_config, device)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        with (
            scoped(model_runner, "init_model_state", init_tree_state),
            registered_backend(AttentionBackendEnum.CPU_ATTN, TreeCPUAttentionBackend),
        ):
            super().load_model(*args, **kwargs)
        self.speculator.chain_only = self.model_state.chain_only


class SpecPlusV2CPUModelRunner(_TreeRunner, CPUModelRunner):
    """The V2 runner on a CPU, under Triton's interpreter: how it is tested without a GPU."""
