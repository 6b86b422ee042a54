"""Patches: there when needed, gone without a trace; refusals that need the whole VllmConfig."""

from __future__ import annotations

import inspect
import subprocess
import sys
from functools import reduce
from typing import Any

import pytest
from vllm import AsyncEngineArgs, EngineArgs, SamplingParams, envs
from vllm.config import KVTransferConfig, VllmConfig
from vllm.exceptions import VLLMValidationError

from tests.engine.configs import LATENT_ATTENTION, LLAMA, MAMBA, write_config
from vllm_specplus.errors import NotBuiltError, OptionError
from vllm_specplus.startup import patches
from vllm_specplus.startup.patches import Patch
from vllm_specplus.startup.refusals import tree_refusals, v2_refusals

pytestmark = pytest.mark.usefixtures("only_the_options_patched")
ARG_UTILS = "vllm.engine.arg_utils"
OPTIONS_ONLY = [
    f"{ARG_UTILS}.EngineArgs.__init__",
    f"{ARG_UTILS}.AsyncEngineArgs.__init__",
    f"{ARG_UTILS}.EngineArgs.add_cli_args",
    f"{ARG_UTILS}.EngineArgs.from_cli_args",
]
NGRAM = {"speculative_model": "[ngram]", "num_speculative_tokens": 5}
TREE = NGRAM | {"speculative_tree": "dynamic:12"}
STOCK_NGRAM = {"method": "ngram", "num_speculative_tokens": 5}


def build(model: str, **arguments: Any) -> VllmConfig:
    return EngineArgs(model=model, skip_tokenizer_init=True, **arguments).create_engine_config()


@pytest.mark.parametrize("arguments", [{}, {"speculative_config": STOCK_NGRAM}])
def test_without_our_options_vllm_is_as_without_us(model: str, arguments: dict[str, Any]) -> None:
    patched = build(model, **arguments)
    assert patches.active() == OPTIONS_ONLY
    patches.undo()
    stock = build(model, **arguments)
    assert patches.active() == []
    assert str(patched) == str(stock)
    assert patched.compute_hash() == stock.compute_hash()
    assert patched.additional_config == stock.additional_config == {}
    assert patched.parallel_config.worker_cls == stock.parallel_config.worker_cls


def test_a_chain_is_what_vllm_would_have_been_told(model: str) -> None:
    ours, stock = build(model, **NGRAM), build(model, speculative_config=STOCK_NGRAM)
    assert patches.active() == OPTIONS_ONLY
    assert str(ours) == str(stock) and ours.compute_hash() == stock.compute_hash()


def test_a_tree_in_the_config_that_travels(model: str) -> None:
    config = build(model, **TREE)
    assert config.num_speculative_tokens == 12 and config.num_lookahead_tokens == 0
    assert config.additional_config["specplus"]["tree"] == "dynamic:12"
    assert config.parallel_config.worker_cls == "vllm_specplus.engine.worker.SpecPlusCPUWorker"
    assert set(patches.active()) > set(OPTIONS_ONLY)


def test_min_p_and_logit_bias_are_let_through_for_trees_only(model: str) -> None:
    """Seen to fail when `_validate_spec_decode` lets every config through, and when none."""
    tree, chain = build(model, **TREE), build(model, **NGRAM)
    for params in (SamplingParams(min_p=0.2), SamplingParams(logit_bias={3: 1.0})):
        params.verify(tree.model_config, tree.speculative_config, None, None)
        with pytest.raises(VLLMValidationError, match="min_p and logit_bias"):
            params.verify(chain.model_config, chain.speculative_config, None, None)


def test_patches_are_applied_once_and_undone() -> None:
    patched = vars(EngineArgs)["__init__"]
    patches.apply("options")
    assert vars(EngineArgs)["__init__"] is patched
    assert patches.active() == OPTIONS_ONLY
    assert "model" in inspect.signature(EngineArgs).parameters
    patches.undo()
    assert inspect.isfunction(vars(EngineArgs)["__init__"])
    assert isinstance(vars(EngineArgs)["add_cli_args"], staticmethod)
    assert isinstance(vars(EngineArgs)["from_cli_args"], classmethod)
    with pytest.raises(TypeError, match="speculative_model"):
        AsyncEngineArgs(model="m", **NGRAM)


@pytest.mark.parametrize("first", ["vllm_specplus", "vllm_specplus.core.tree", "vllm"])
def test_patched_once_whatever_is_imported_first(first: str) -> None:
    """Patched twice, the flags would be added twice, which argparse refuses."""
    code = (
        f"import {first}\n"
        "from vllm import EngineArgs\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "EngineArgs.add_cli_args(FlexibleArgumentParser()).format_help()\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]


def test_a_name_that_is_gone_is_said_and_nothing_is_patched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patches.undo()
    gone = Patch("options", ARG_UTILS, "EngineArgs.gone", lambda *_: None)
    monkeypatch.setattr(patches, "PATCHES", (*patches.PATCHES, gone))
    with pytest.raises(NotBuiltError, match=r"^vllm.engine.arg_utils.EngineArgs.gone was not fou"):
        patches.apply("options")
    assert patches.active() == []


def test_on_a_command_line_our_errors_are_one_line() -> None:
    script = (
        "from vllm_specplus.startup import patches\n"
        "from vllm_specplus.errors import bad_option\n"
        "patches.apply('command line')\n"
    )
    raised = "raise bad_option('a', 1, 'is bad', 'use 2')", "raise ValueError('not ours')"
    ours, other = (
        subprocess.run([sys.executable, "-c", script + line], capture_output=True, text=True)
        for line in raised
    )
    assert (ours.returncode, ours.stderr) == (1, "vllm: error: a=1 is bad; use 2.\n")
    assert other.returncode == 1 and "Traceback" in other.stderr


MULTI = {
    "connectors": [
        {"kv_connector": name, "kv_role": "kv_both"}
        for name in ("NixlConnector", "LMCacheConnectorV1")
    ]
}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype='fp8' cannot be combined"),
        (
            {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"},
            "pipeline_parallel_size=2 cannot be combined",
        ),
        (
            {"kv_transfer_config": KVTransferConfig("LMCacheConnectorV1", kv_role="kv_both")},
            "kv_connector='LMCacheConnectorV1' cannot be combined",
        ),
        (
            {
                "kv_transfer_config": KVTransferConfig(
                    "MultiConnector", kv_role="kv_both", kv_connector_extra_config=MULTI
                )
            },
            "kv_connector='LMCacheConnectorV1' cannot be combined",
        ),
    ],
)
def test_refused_for_trees_only(model: str, arguments: dict[str, Any], said: str) -> None:
    build(model, **NGRAM, **arguments)
    with pytest.raises(NotBuiltError, match=r"; [^\n]* or use speculative_tree='chain'\.$") as e:
        build(model, **TREE, **arguments)
    assert said in str(e.value)


@pytest.mark.parametrize("method", ["lookahead", "lookahead+ngram"])
def test_the_way_out_is_a_chain_that_vllm_has(model: str, method: str) -> None:
    """Of lookahead and of two methods there is none."""
    with pytest.raises(NotBuiltError, match=r"='\[ngram\]' without speculative_tree\)\.$"):
        build(model, speculative_model=f"[{method}]", kv_cache_dtype="fp8")


def test_a_connector_that_saves_after_the_step_is_accepted(model: str) -> None:
    build(model, **TREE, kv_transfer_config=KVTransferConfig("NixlConnector", kv_role="kv_both"))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        pytest.param(MAMBA, "recurrent layers", marks=pytest.mark.slow),
        (LATENT_ATTENTION, "multi-head latent attention"),
        (LLAMA | {"is_encoder_decoder": True}, "an encoder-decoder"),
        (LLAMA | {"alibi": True}, "ALiBi"),
        (LLAMA | {"attention_chunk_size": 64}, "chunked local attention"),
        (LLAMA | {"layer_types": ["linear_attention", "full_attention"]}, "recurrent layers"),
    ],
)
def test_models_refused_for_trees(tmp_path: Any, config: dict[str, Any], said: str) -> None:
    (refusal,) = tree_refusals(build(write_config(tmp_path, config)))
    assert said in refusal and refusal.startswith(f"model='{tmp_path}' cannot be combined")


def test_block_verification_needs_the_v2_runner(model: str) -> None:
    with pytest.raises(NotBuiltError, match="speculative_verify='block' needs vLLM's V2"):
        build(model, **NGRAM, speculative_verify="block")
    build(model, **NGRAM, speculative_verify="rejection")


def test_v2_runner_is_refused(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    envs.disable_envs_cache()  # an engine that ran before has turned it on
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(NotBuiltError, match=r"^VLLM_USE_V2_MODEL_RUNNER=1 selects"):
        build(model, **TREE)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("model_config.return_sampling_mask", True, "no sampling masks"),
        ("model_config.enable_trace_replay", True, "does not replay"),
        ("parallel_config.enable_batch_sharded_sampling", True, "verified as a whole"),
        ("parallel_config.enable_dbo", True, "for whole batches"),
        ("parallel_config.data_parallel_size", 2, "not that of the trees"),
        ("speculative_config.enable_adaptive_verification", True, "as if they were chains"),
        ("speculative_config.rejection_sample_method", "block", "rules of their own"),
        ("lora_config", True, "with adapters"),
        ("additional_config", {"specplus": {"ngram_prompt_lookup_max": 17}}, "16 tokens back"),
    ],
)
def test_refused_in_the_v2_runner(model: str, path: str, value: Any, said: str) -> None:
    config = build(model, **TREE)
    assert list(v2_refusals(config)) == list(v2_refusals(build(model))) == []
    *owners, name = path.split(".")
    setattr(reduce(getattr, owners, config), name, value)
    ((field, found, reason, _),) = v2_refusals(config)
    assert path.endswith(field) or field in ("ngram_prompt_lookup_max", "enable_lora")
    assert said in reason and found


def test_option_errors_are_of_the_kinds_that_users_expect() -> None:
    assert issubclass(OptionError, ValueError)
    assert issubclass(NotBuiltError, NotImplementedError)
