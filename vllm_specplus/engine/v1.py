"""The CPU engine: token trees in vLLM's V1 model runner.

vLLM's step runs unchanged; the round's four acts hang on the hooks where it prepares inputs, builds
attention metadata, samples and drafts. Trees travel with their tokens through vLLM's flat draft
lists (`Tree.encode`), so the runner keeps nothing between steps and every worker of a tensor
parallel group sees the same trees.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from specplus_kernels.kv_commit import KVCommitPlan

from vllm_specplus.config import SpecPlusConfig
from vllm_specplus.core.cost import fastest
from vllm_specplus.core.step_clock import StepClock
from vllm_specplus.core.tree import Tree
from vllm_specplus.engine.attention import attach_tree
from vllm_specplus.engine.attention_cpu import TreeCPUAttentionBackend, kv_views
from vllm_specplus.engine.compat import (
    AttentionBackendEnum,
    KVCacheConfig,
    LogprobsTensors,
    SamplingParams,
    SchedulerOutput,
    VllmConfig,
    registered_backend,
)
from vllm_specplus.engine.compat_cpu import (
    CPUModelRunner,
    SamplerOutput,
    SamplingMetadata,
    SamplingType,
)
from vllm_specplus.engine.drafters.levels_v1 import PagedHeads, load_draft_model
from vllm_specplus.engine.drafters.medusa_cpu import packed_medusa
from vllm_specplus.engine.drafters.models_v1 import PagedModel, reads_aux_hidden_states
from vllm_specplus.engine.sampling import RowSamples, RowSource, sample_rows
from vllm_specplus.proposers.base import DraftRequest
from vllm_specplus.proposers.medusa import MedusaProposer
from vllm_specplus.proposers.merged import by_levels
from vllm_specplus.round import Moves, SpecRound, Staged

_MOST_ROWS_TIMED = 128
"""Beyond these rows drafts never pay on a CPU."""


class TreeDrafter:
    """What vLLM's `custom_class` method instantiates: the round of this engine."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        options = vllm_config.additional_config["specplus"]
        self.round = SpecRound(SpecPlusConfig.model_validate(options))
        self.models: list[PagedHeads | PagedModel] = []
        self._vllm_config = vllm_config

    def load_model(self, target_model: torch.nn.Module) -> None:
        """Loads what the proposer drafts with beside the target, if it does."""
        proposer = self.round.proposer
        for number, part in enumerate(by_levels(proposer)):
            part.model = load_draft_model(part, target_model, self._vllm_config, number)
            self.models.append(part.model)
        if isinstance(proposer, MedusaProposer):
            heads = packed_medusa(proposer.config, target_model, self._vllm_config)
            proposer.model, proposer.num_heads = heads, heads.config.num_heads

    def propose(self, *_: Any, **__: Any) -> None:
        raise AssertionError("SpecPlusCPUModelRunner drafts by itself")


@dataclass(slots=True)
class _Step:
    """What a step carries from one hook to the next."""

    trees: list[Tree]
    staged: Staged
    slot_mappings: dict[int, torch.Tensor] = field(init=False)
    way: str = field(init=False)
    row_tokens: torch.Tensor = field(init=False)
    on_path: torch.Tensor = field(init=False)
    moves: Moves = field(init=False)


class SpecPlusCPUModelRunner(CPUModelRunner):
    """vLLM's CPU runner with the speculative round on trees."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.round: SpecRound = self.drafter.round
        self.use_aux_hidden_state_outputs = reads_aux_hidden_states(
            self.round.proposer, vllm_config
        )
        self._drafts: dict[str, Tree] = {}
        self._current: _Step | None = None
        self._commit_plans: dict[int, KVCommitPlan] = {}
        self._clock = StepClock(self.round.budget)
        self._seeds = torch.Generator().manual_seed(vllm_config.model_config.seed)

    @property
    def _step(self) -> _Step:
        assert self._current is not None, "the hook was called outside a step"
        return self._current

    # Start-up.

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        with registered_backend(AttentionBackendEnum.CPU_ATTN, TreeCPUAttentionBackend):
            super().load_model(*args, **kwargs)

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, *args: Any, **kw: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, *args, **kw)
        layers = self.compilation_config.static_forward_context
        for gid, group in enumerate(self.kv_cache_config.kv_cache_groups):
            views = [view for name in group.layer_names for view in kv_views(layers[name])]
            self._commit_plans[gid] = KVCommitPlan(views)
            for model in self.drafter.models:
                model.bind(group.layer_names, self.input_batch.block_table[gid])

    @torch.inference_mode()
    def measure_step_costs(self) -> dict[int, float]:
        """Milliseconds that the target's forward pass takes at 1, 2, 4, ... rows.

        Attention and the host's work are left out: the budget learns them while serving.
        """
        most = self.max_num_reqs * (1 + self.num_spec_tokens)
        most = min(most, self.max_num_tokens, _MOST_ROWS_TIMED)
        points = sorted({min(1 << i, most) for i in range(_MOST_ROWS_TIMED.bit_length())})
        return fastest(self._time_rows, points)

    @torch.inference_mode()
    def measure_level_costs(self) -> None:
        """Tells the proposer what a level of drafts takes, where it drafts in levels."""
        for part, model in zip(by_levels(self.round.proposer), self.drafter.models, strict=True):
            most, dtype = min(64, model.max_len), self.model_config.dtype
            part.measure_levels(lambda: self._time_rows(1), most, dtype)
        if isinstance(self.round.proposer, MedusaProposer):
            size = min(64, self.max_num_reqs), self.model_config.get_hidden_size()
            hidden = torch.zeros(size, dtype=self.model_config.dtype)
            self.round.proposer.measure_heads(lambda: self._time_rows(1), hidden)

    def _time_rows(self, rows: int) -> float:
        start = time.perf_counter()
        hidden_states, _ = self._dummy_run(rows)
        self.model.compute_logits(hidden_states[:rows])
        return 1e3 * (time.perf_counter() - start)

    # Stage.

    def execute_model(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        self._clock.start()
        drafts = scheduler_output.scheduled_spec_decode_tokens
        self._drafts = {req_id: Tree.decode(codes) for req_id, codes in drafts.items()}
        tokens = {req_id: list(tree.tokens) for req_id, tree in self._drafts.items()}
        scheduler_output = replace(scheduler_output, scheduled_spec_decode_tokens=tokens)
        return super().execute_model(scheduler_output, *args, **kwargs)

    def _update_states(self, scheduler_output: SchedulerOutput) -> Any:
        deferred = super()._update_states(scheduler_output)
        for request in scheduler_output.scheduled_new_reqs:
            self._give_generator(request.req_id)
        return deferred

    def _give_generator(self, req_id: str) -> None:
        """A generator for an unseeded request: how many rows are drawn depends on timing, so a
        stream shared by all requests would not repeat from run to run."""
        state = self.requests[req_id]
        if state.generator is None and state.sampling_params.sampling_type == SamplingType.RANDOM:
            seed = int(torch.randint(0, 2**31, (1,), generator=self._seeds))
            state.generator = torch.Generator().manual_seed(seed)
            index = self.input_batch.req_id_to_index[req_id]
            self.input_batch.generators[index] = state.generator

    def _prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_inputs(*args, **kwargs)
        trees = [self._drafts.get(req_id, Tree()) for req_id in self.input_batch.req_ids]
        staged = self.round.stage(trees, self.query_start_loc.np[: len(trees) + 1])
        if staged.branching:
            staged.tree_positions(self.positions)
            if self.uses_mrope:
                staged.tree_positions(self.mrope_positions.gpu)
        self._current = _Step(trees, staged)
        return prepared

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> Any:
        built = super()._build_attention_metadata(*args, **kwargs)
        if self._current is not None:
            step, num_reqs, num_tokens = self._step, kwargs["num_reqs"], kwargs["num_tokens"]
            step.slot_mappings = kwargs["slot_mappings"]
            if step.staged.branching:
                groups = {id(group): group for group in built[0].values()}.values()
                context_lens = self.num_computed_tokens[:num_reqs]
                attach_tree(groups, step.staged, self.positions[:num_tokens], context_lens)
        return built

    # Verify and commit.

    def _sample(self, logits: torch.Tensor, spec_decode_metadata: Any) -> SamplerOutput:
        step, rows = self._step, self._step.staged.logits_index
        samples = self._draw(logits)
        step.row_tokens = samples.tokens[rows]
        step.on_path = self.round.verify(step.staged, samples.tokens)
        self._advance_generators(samples, step.on_path)
        step.moves = self.round.commit(step.staged, step.on_path)
        if len(step.moves):
            for gid, slots in step.slot_mappings.items():
                self._commit_plans[gid](slots[step.moves.source], slots[step.moves.target])
        return SamplerOutput(
            sampled_token_ids=step.row_tokens.where(step.on_path, -1).int(),
            logprobs_tensors=_take(samples.logprobs, rows.flatten()),
        )

    def _draw(self, logits: torch.Tensor) -> RowSamples:
        step, states = self._step, [self.requests[req_id] for req_id in self.input_batch.req_ids]
        sources = [
            RowSource(state.sampling_params, state.prompt_token_ids, state.output_token_ids, tree)
            for state, tree in zip(states, step.trees, strict=True)
        ]
        start = time.perf_counter()
        samples = sample_rows(self.sampler, logits, self.input_batch.sampling_metadata, sources)
        step.way = samples.way
        self._clock.sampled(step.way, len(logits), time.perf_counter() - start)
        return samples

    def _advance_generators(self, samples: RowSamples, on_path: torch.Tensor) -> None:
        emitted = on_path.sum(1).numpy()
        discarded = self.discard_request_mask.np[: len(emitted)]
        samples.advance(self.input_batch.generators, np.where(discarded, 0, emitted).tolist())

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        # vLLM rewinds the generators of prompt chunks, which CPU generators cannot do; ours have
        # not moved.
        generators = self.input_batch.generators
        hidden = dict(generators)
        generators.clear()
        try:
            return super()._bookkeeping_sync(*args, **kwargs)
        finally:
            generators.update(hidden)

    # Propose.

    def _input_fits_in_drafter(self, common_attn_metadata: Any) -> bool:
        return common_attn_metadata is not None

    def propose_draft_token_ids(
        self,
        scheduler_output: SchedulerOutput,
        sampled_token_ids: list[list[int]],
        sampling_metadata: SamplingMetadata,
        hidden_states: torch.Tensor,
        sample_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        *args: Any,
    ) -> list[list[int]]:
        step, self._current = self._step, None
        self._commit_rows([hidden_states, *(aux_hidden_states or ())], step.moves)
        req_ids = self.input_batch.req_ids
        on_path, row_tokens = step.on_path.tolist(), step.row_tokens.tolist()
        if aux_hidden_states:
            hidden_states = self.drafter.models[0].combine(aux_hidden_states)
        self._absorb(hidden_states, sampled_token_ids)
        requests = []
        for index, (req_id, tree) in enumerate(zip(req_ids, step.trees, strict=True)):
            sampled = bool(sampled_token_ids[index])
            if sampled:
                rows = [row for row, accepted in enumerate(on_path[index]) if accepted and row]
                tree = tree if step.staged.is_tree[index] else tree.as_chain()
                self.round.observe(req_id, tree, rows, row_tokens[index][: len(tree) + 1])
            requests.append(self._draft_request(index, req_id, sampled))
        with self._clock.drafting():
            drafts = self.round.propose(requests, self._clock.row_ms(step.way))
        decoding = bool(step.staged.is_tree.all())
        num_rows = scheduler_output.total_num_scheduled_tokens if decoding else None
        self._clock.stop(num_rows, drafted=bool(self._drafts))
        return [tree.encode() for tree in drafts]

    def _commit_rows(self, hidden_states: list[torch.Tensor], moves: Moves) -> None:
        """The accepted path's hidden states, input ids and positions, in contiguous rows."""
        if len(moves):
            for rows in (*hidden_states, self.input_ids.gpu, self.positions):
                rows[moves.target] = rows[moves.source]

    def _absorb(self, hidden_states: torch.Tensor, sampled_token_ids: list[list[int]]) -> None:
        """Hands the proposer the hidden states of the positions that are committed now."""
        starts = self.input_batch.num_computed_tokens_cpu
        for index, req_id in enumerate(self.input_batch.req_ids):
            row, end = self.query_start_loc.np[index : index + 2]
            if sampled_token_ids[index]:
                end = row + self.input_batch.num_tokens_no_spec[index] - 1 - starts[index]
            self.round.proposer.absorb(req_id, int(starts[index]), hidden_states[row:end])

    def _draft_request(self, index: int, req_id: str, sampled: bool) -> DraftRequest:
        """Bounds of a request's next draft; none for prompt chunks."""
        state = self.requests[req_id]
        params = state.sampling_params
        num_tokens = int(self.input_batch.num_tokens_no_spec[index])
        room = self.max_model_len - num_tokens - 1
        max_depth = min(room, self.round.max_depth)
        if params.max_tokens is not None:
            max_depth = min(max_depth, params.max_tokens - len(state.output_token_ids) - 1)
        if not sampled or fallback(params) == "thinking_budget":
            max_depth = 0
        return DraftRequest(
            req_id=req_id,
            token_ids=self.input_batch.token_ids_cpu[index, :num_tokens],
            max_depth=max_depth,
            max_nodes=min(room, self.num_spec_tokens),
            chain_only=fallback(params) == "structured_outputs",
            index=index,
            num_slots=min((m.num_slots(index) for m in self.drafter.models), default=0),
        )

    def _on_request_state_removed(self, req_id: str, req_state: Any) -> None:
        super()._on_request_state_removed(req_id, req_state)
        self.round.forget(req_id)


def fallback(params: SamplingParams) -> str | None:
    """Why a request is not drafted a tree: vLLM applies a thinking budget to the root only, so it
    gets no drafts, and follows one sequence through a grammar, so it gets a chain."""
    if params.thinking_token_budget is not None:
        return "thinking_budget"
    return "structured_outputs" if params.structured_outputs is not None else None


def _take(logprobs: LogprobsTensors | None, rows: torch.Tensor) -> LogprobsTensors | None:
    """Row logprobs in vLLM's padded [num_reqs * num_rows] layout."""
    return None if logprobs is None else LogprobsTensors(*(t[rows] for t in logprobs[:3]))
