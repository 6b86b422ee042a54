"""The V2 engine: token trees in vLLM's V2 model runner.

vLLM's step runs unchanged. Trees live on the device, encoded in the runner's own draft tokens by
request slot (`Tree.encode`, kernel `tree_stage`), so under async scheduling the host never sees
them and nothing of ours needs to follow a request through preemption, unless they are drafted on
the host (`engine/drafters/host_v2.py`). The round hangs on three of
vLLM's objects: a model state stages the tree and commits the accepted path, a rejection sampler
verifies, a speculator proposes.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from specplus_kernels.kv_commit import KVCommitPlan
from specplus_kernels.tree_stage import tree_stage
from specplus_kernels.verify import Rule

from vllm_specplus.config import SpecPlusConfig, Verify
from vllm_specplus.core.rank_counts import RankCounts
from vllm_specplus.core.tree import WORD_BITS, Tree
from vllm_specplus.engine.attention import (
    GPU_BACKENDS,
    TreeRows,
    TreeRowsMixin,
    gpu_backends,
)
from vllm_specplus.engine.compat import (
    KVCacheConfig,
    SamplingParams,
    VllmConfig,
    async_tensor_h2d,
    registered_backend,
    scoped,
)
from vllm_specplus.engine.compat_v2 import (
    AttentionGroup,
    BlockTables,
    DefaultModelState,
    GPUModelRunner,
    InputBatch,
    RequestState,
    Sampler,
    model_runner,
    resolve_model_state_cls,
)
from vllm_specplus.engine.drafters.host_v2 import HostTreeSpeculator
from vllm_specplus.engine.drafters.medusa_v2 import MedusaTreeSpeculator
from vllm_specplus.engine.drafters.windows import init_trunk
from vllm_specplus.engine.v2_chain import ChainDrafter, with_depth
from vllm_specplus.engine.v2_speculator import NgramTreeSpeculator
from vllm_specplus.engine.v2_verifier import TreeVerifier
from vllm_specplus.errors import VLLM_CHAINS, not_built

_RULES: dict[Verify, Rule] = {
    "auto": "match",
    "match": "match",
    "rejection": "recursive",
    "traversal": "traversal",
    "typical": "typical",
}


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
        self.has_trees = True
        self.max_depth = config.num_speculative_tokens
        self.rule = _RULES[config.verify]
        self.path = torch.empty(0)
        self.row_tokens: list[torch.Tensor] = []  # of a step's rows, by the rule `match`
        self._slot_mappings: torch.Tensor | None = None
        self._layers: list[list[Any]] = []
        self._commit_plans: list[KVCommitPlan | None] | None = None
        self._req_states: RequestState | None = None
        self._has_processors = False
        self.ranks: RankCounts | None = None  # counted when asked for

    # Start-up and requests.

    def custom_sampler(self, sampler: Sampler) -> tuple[Sampler, TreeVerifier]:
        self._req_states = sampler.req_states
        modules = [type(processor).__module__ for processor in sampler.logits_processors]
        self._has_processors = not all(module.startswith("vllm.") for module in modules)
        return sampler, TreeVerifier(sampler, self)

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, block_tables: BlockTables
    ) -> None:
        super().initialize_kv_cache(kv_cache_config, block_tables)
        # Plans hold on to the caches, which are thrown away once when vLLM measures its graphs.
        self._commit_plans = None
        self._layers = [
            [layer for name in group.layer_names if (layer := self._target_layer(name))]
            for group in kv_cache_config.kv_cache_groups
        ]

    def _target_layer(self, name: str) -> Any:
        """An attention layer whose KV is committed: not a drafter's, which writes its KV anew.

        Raises NotBuiltError for an attention backend that trees were not built for.
        """
        layer = self.vllm_config.compilation_config.static_forward_context[name]
        if getattr(layer, "is_draft_layer", False):
            return None
        if not isinstance(layer.impl, TreeRowsMixin):
            raise not_built(
                "attention_backend",
                layer.attn_backend.get_name(),
                "is not one that trees were built for",
                f"use {', '.join(GPU_BACKENDS)}, or {VLLM_CHAINS}",
            )
        return layer

    def _plan_commits(self) -> list[KVCommitPlan | None]:
        """Per KV group; none for groups of drafters' layers alone."""
        views = [[v for layer in g for v in layer.impl.kv_views(layer)] for g in self._layers]
        return [KVCommitPlan(group) if group else None for group in views]

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        assert self._req_states is not None
        self._req_states.chain_only[req_index] = bool(self.fallback(new_req_data.sampling_params))

    def fallback(self, params: SamplingParams) -> str | None:
        """Why vLLM reads a request's rows as one sequence, which only a chain is; or None."""
        reasons = {
            "structured_outputs": params.structured_outputs is not None,
            "thinking_budget": params.thinking_token_budget is not None,
            "bad_words": bool(params.bad_words),
            "penalties": params.repetition_penalty != 1
            or bool(params.frequency_penalty or params.presence_penalty),
            "logits_processors": self._has_processors,
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    # Stage.

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: Any,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: list[list[AttentionGroup]],
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
        if not self.has_trees:
            return metadata
        self._slot_mappings = slot_mappings
        num_rows = input_batch.num_tokens_after_padding
        self.positions[:num_rows].copy_(input_batch.positions)
        if input_batch.num_draft_tokens:
            self._stage(input_batch)
        # A graph of more rows than requests replays trees, whose rows are staged then.
        if input_batch.num_draft_tokens or (for_capture and num_rows > input_batch.num_reqs):
            trees = self._trees(input_batch, for_capture)
            for groups, block_table in zip(attn_groups, block_tables, strict=True):
                for group in groups:
                    table = group.map_to_kernel_block_table(block_table)
                    metadata[group.layer_names[0]].tree = TreeRows(block_table=table, **trees)
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

    def _trees(self, input_batch: InputBatch, for_capture: bool) -> dict[str, Any]:
        """`TreeRows` of the batch but for the block table. Its trees are the requests whose rows
        are a tree and nothing else; prompts stay with causal attention."""
        padded, num_rows = len(input_batch.seq_lens), input_batch.num_tokens_after_padding
        query_start_loc = input_batch.query_start_loc[: padded + 1]
        context_lens = self._context_lens[:padded]
        torch.sub(input_batch.seq_lens, query_start_loc.diff(), out=context_lens)
        requests = None
        max_query_len = num_rows // input_batch.num_reqs
        if not for_capture:
            query_lens = np.diff(input_batch.query_start_loc_np[: input_batch.num_reqs + 1])
            is_tree = query_lens == 1 + input_batch.num_draft_tokens_per_req
            max_query_len = 1 + int(input_batch.num_draft_tokens_per_req.max())
            if not np.all(is_tree):
                requests = async_tensor_h2d(np.flatnonzero(is_tree), self.device, torch.int32)
        return {
            "query_start_loc": query_start_loc,
            "requests": requests,
            "covers_all": requests is None,
            "ancestor_mask": self._ancestor_mask[:num_rows],
            "positions": self.positions[:num_rows],
            "context_lens": context_lens,
            "max_query_len": max_query_len,
        }

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
        self.path = path
        roots = input_batch.logits_indices[input_batch.cu_num_logits[:-1].long()]
        target = torch.arange(path.shape[1], device=self.device)
        moved = path > target  # padding is negative, and no accepted node lies before its place
        assert self._slot_mappings is not None
        self._commit_plans = self._commit_plans or self._plan_commits()
        for plan, slots in zip(self._commit_plans, self._slot_mappings, strict=True):
            if plan is None:
                continue
            source_slots = slots[(roots[:, None] + path).where(moved, 0)]
            target_slots = slots[(roots[:, None] + target).where(moved, 0)]
            plan(source_slots.where(moved, -1), target_slots.where(moved, -1))
        if self.ranks is not None and input_batch.num_draft_tokens:
            self._count_ranks(self.ranks, input_batch)

    def _count_ranks(self, ranks: RankCounts, input_batch: InputBatch) -> None:
        """Counts the trees of a step, also those without nodes: their rows have run."""
        assert self._req_states is not None
        drafts = self._req_states.draft_tokens[input_batch.idx_mapping].tolist()
        each = zip(drafts, self.path.tolist(), input_batch.num_draft_tokens_per_req, strict=True)
        for codes, path, num_rows in each:
            tree = Tree.decode([code for code in codes[:num_rows] if code >= 0])
            ranks.observe(tree, [row for row in path if row > 0])
            ranks.by_row[0] += num_rows > 0 and not len(tree)


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
            f"use {VLLM_CHAINS}",
        )
    return TreeModelState(vllm_config, model, *args)


def init_tree_speculator(
    vllm_config: VllmConfig, device: torch.device, req_states: RequestState
) -> NgramTreeSpeculator | ChainDrafter:
    """vLLM's `init_speculator` for trees: of n-grams, Medusa heads, a drafter of vLLM, or two, or
    of what drafts on the host."""
    ngram = NgramTreeSpeculator(vllm_config, device, req_states)
    if any(spec.name == "medusa" for spec in ngram.config.methods):
        return MedusaTreeSpeculator(vllm_config, device, req_states)
    if ngram.config.method == "ngram":
        return ngram
    if vllm_config.speculative_config.use_ngram():
        return HostTreeSpeculator(vllm_config, device, req_states)
    chain_config = with_depth(vllm_config, ngram.config.num_speculative_tokens)
    return ChainDrafter(init_trunk(chain_config, device, req_states), ngram)


class TreeRunner(GPUModelRunner):
    """vLLM's V2 runner with our speculator, model state and attention."""

    backends = staticmethod(gpu_backends)

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        with scoped(model_runner, "init_speculator", init_tree_speculator):
            super().__init__(vllm_config, device)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        with ExitStack() as stack:
            stack.enter_context(scoped(model_runner, "init_model_state", init_tree_state))
            for kind, backend in self.backends().items():
                stack.enter_context(registered_backend(kind, backend))
            super().load_model(*args, **kwargs)
        self.speculator.model_state = self.model_state
        if isinstance(self.speculator, MedusaTreeSpeculator):
            self.speculator.load_model(self.model)
