"""The three spellings, where they lead, and what they refuse; no engine is started here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig, PretrainedConfig
from vllm import EngineArgs

from tests.engine.configs import LLAMA, write_config
from tests.proposers.heads.heads import config as heads
from tests.proposers.heads.heads import modules
from tests.startup.spellings import TREE, TREE_KEYS, by_flags, by_keywords, outcome
from vllm_specplus.config import SpecPlusConfig
from vllm_specplus.errors import NotBuiltError, OptionError
from vllm_specplus.proposers.heads.checkpoint import save_heads
from vllm_specplus.proposers.heads.hf import HeadsModelConfig
from vllm_specplus.startup import host, options
from vllm_specplus.startup.refusals import chain_refusals

pytestmark = pytest.mark.usefixtures("only_the_options_patched")
TREE_OF_HEADS = {"num_speculative_tokens": 3, "speculative_tree": "dynamic:8"}
WIDTHS = "num_speculative_tokens_per_batch_size"


def test_a_tree_goes_to_our_engine(model: str) -> None:
    arguments = by_keywords(model, **TREE, additional_config={"mine": 1})
    assert arguments.speculative_config == {
        "method": "custom_class",
        "model": "vllm_specplus.engine.v1.TreeDrafter",
        "num_speculative_tokens": 12,
    }
    assert arguments.worker_cls == "vllm_specplus.engine.worker.SpecPlusCPUWorker"
    assert arguments.additional_config["mine"] == 1
    config = SpecPlusConfig.model_validate(arguments.additional_config["specplus"])
    assert str(config.tree) == "dynamic:12" and config.num_speculative_tokens == 5
    assert (config.ngram_prompt_lookup_min, config.ngram_prompt_lookup_max) == (1, 4)
    assert isinstance(arguments.additional_config["specplus"], dict)
    json.dumps(arguments.additional_config)


def test_three_spellings_of_a_tree_mean_the_same(model: str) -> None:
    wanted = outcome(by_keywords(model, **TREE))
    assert outcome(by_flags(model, **TREE)) == wanted
    assert outcome(by_keywords(model, speculative_config=TREE_KEYS)) == wanted
    assert outcome(by_flags(model, speculative_config=TREE_KEYS)) == wanted
    mixed = {"method": "ngram", "prompt-lookup-max": 4}
    rest = {"spec_tokens": 5, "speculative_tree": "dynamic:12"}
    several = by_flags(model, speculative_config=mixed, **rest)
    assert outcome(several) == wanted
    assert several.spec_tokens is None  # vLLM would say that it is said twice
    assert outcome(by_keywords(model, **TREE, speculative_config=TREE_KEYS)) == wanted


def test_translated_arguments_stay_as_they_are(model: str) -> None:
    """vLLM copies its arguments, for instance to API server processes."""
    config, additional, worker = outcome(by_keywords(model, **TREE))
    again = EngineArgs(
        model=model, speculative_config=config, additional_config=additional, worker_cls=worker
    )
    assert outcome(again) == (config, additional, worker)


@pytest.mark.parametrize(
    ("arguments", "native"),
    [
        (
            {"speculative_model": "facebook/opt-125m"},
            {"method": "draft_model", "model": "facebook/opt-125m"},
        ),
        (
            {"speculative_model": "[draft]facebook/opt-125m", "speculative_verify": "rejection"},
            {
                "method": "draft_model",
                "model": "facebook/opt-125m",
                "rejection_sample_method": "standard",
            },
        ),
        (
            {"speculative_model": "[eagle]org/head", "speculative_verify": "block"},
            {"method": "eagle", "model": "org/head", "rejection_sample_method": "block"},
        ),
        ({"speculative_model": "[eagle3]org/head"}, {"method": "eagle3", "model": "org/head"}),
        (
            {"speculative_model": "[ngram]", "ngram_prompt_lookup_max": 4},
            {"method": "ngram", "prompt_lookup_max": 4},
        ),
        ({"speculative_model": "[suffix]"}, {"method": "suffix"}),
    ],
)
def test_chains_of_vllm_are_left_to_vllm(
    model: str, arguments: dict[str, Any], native: dict[str, Any]
) -> None:
    stock = outcome(EngineArgs(model=model))
    for spelled in (by_keywords, by_flags):
        given = outcome(spelled(model, num_speculative_tokens=5, **arguments))
        assert given == (native | {"num_speculative_tokens": 5}, *stock[1:])


@pytest.mark.parametrize(
    ("model_type", "count"),
    [
        ("deepseek_v3", "num_nextn_predict_layers"),
        ("qwen3_5_text", "mtp_num_hidden_layers"),
        ("minimax_m3_vl", "num_mtp_modules"),
    ],
)
@pytest.mark.parametrize("method", ["mtp", "mtp3"])
def test_chains_of_the_models_one_module_are_left_to_vllm(
    method: str, model_type: str, count: str, tmp_path: Path
) -> None:
    model = write_config(tmp_path, LLAMA | {"model_type": model_type, count: 1})
    arguments = by_keywords(model, speculative_model=f"[{method}]", num_speculative_tokens=2)
    assert arguments.speculative_config == {"method": "mtp", "num_speculative_tokens": 2}
    tree = by_keywords(model, **TREE_OF_HEADS, speculative_model=f"[{method}]")
    assert tree.worker_cls == host.CPU_ENGINE.worker_cls


@pytest.mark.parametrize("tree", ["chain", "dynamic:12"])
@pytest.mark.parametrize("method", ["mtp", "mtp3", "mtp3+ngram"])
def test_heads_go_to_our_engine(method: str, tree: str, model: str, tmp_path: Path) -> None:
    arguments = by_keywords(
        model,
        speculative_model=f"[{method}]{tmp_path}",
        num_speculative_tokens=3,
        speculative_tree=tree,
        speculative_config={"revision": "v1"},
    )
    config = SpecPlusConfig.model_validate(arguments.additional_config["specplus"])
    assert (config.method, config.num_speculative_tokens) == (method, 3)
    assert config.revision == "v1"
    assert str(config.tree) == tree


@pytest.mark.parametrize(
    ("method", "trees"), [("mtp3", False), ("mtp3", True), ("mtp3+ngram", True)]
)
def test_heads_are_a_draft_model_of_vllm_on_v2(
    method: str, trees: bool, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("wanted_engine", "tree_engine"):
        monkeypatch.setattr(options, name, lambda: host.V2_ENGINE)
    wanted: dict[str, Any] = {"speculative_model": f"[{method}]{tmp_path}"}
    wanted |= TREE_OF_HEADS if trees else {"num_speculative_tokens": 3}
    save_heads(tmp_path, heads(), modules(heads()))
    with pytest.raises(OptionError, match="do not say in our format what vocab_size"):
        by_keywords(model, **wanted)
    save_heads(tmp_path, heads(vocab_size=99), modules(heads()))
    arguments = by_keywords(model, **wanted)
    assert arguments.speculative_config == {
        "method": "mtp",
        "model": str(tmp_path),
        "num_speculative_tokens": 3,
    }
    assert arguments.worker_cls == (host.V2_ENGINE.worker_cls if trees else "auto")
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.model_type, config.architectures) == ("mtp", ["SpecPlusMTP"])
    assert (config.vocab_size, config.hidden_size) == (99, 12)
    (tmp_path / "not-eagle3").mkdir()
    save_heads(tmp_path / "not-eagle3", heads(vocab_size=99), modules(heads()))
    with pytest.raises(OptionError, match="have 'eagle3' in their name"):
        by_keywords(model, **wanted | {"speculative_model": f"[{method}]{tmp_path}/not-eagle3"})


@pytest.mark.parametrize(
    ("of_heads", "v2", "stages", "said"),
    [
        (True, True, 1, []),
        (True, False, 1, ["set VLLM_USE_V2_MODEL_RUNNER=1"]),
        (True, True, 2, ["pipeline_parallel_size=2 cannot be combined with MTP modules"]),
        (False, False, 2, []),
    ],
)
def test_chains_of_heads_need_all_of_the_model_on_the_v2_runner(
    of_heads: bool, v2: bool, stages: int, said: list[str]
) -> None:
    draft = HeadsModelConfig() if of_heads else PretrainedConfig()
    speculative = SimpleNamespace(
        rejection_sample_method="standard", draft_model_config=SimpleNamespace(hf_config=draft)
    )
    found = chain_refusals(
        SimpleNamespace(
            speculative_config=speculative,
            use_v2_model_runner=v2,
            parallel_config=SimpleNamespace(pipeline_parallel_size=stages),
        )
    )
    assert len(found) == len(said)
    assert all(words in sentence for words, sentence in zip(said, found, strict=True))


def test_keys_of_vllm_are_handed_on_for_a_chain(model: str) -> None:
    keys = {"method": "draft", "model": "org/m", "num_speculative_tokens": 2, "revision": "v1"}
    assert by_keywords(model, speculative_config=keys).speculative_config == keys | {
        "method": "draft_model"
    }


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 5}},
        {"speculative_config": {"method": "medusa", "model": "m", "num_speculative_tokens": 5}},
        {"spec_method": "ngram", "spec_tokens": 3},
    ],
)
def test_stock_arguments_are_not_touched(arguments: dict[str, Any]) -> None:
    before = json.dumps(arguments)
    unset = dict.fromkeys(options.OPTIONS)
    assert options.translate(arguments | unset) == (arguments, ())
    assert json.dumps(arguments) == before


@pytest.mark.parametrize(
    ("error", "arguments", "said"),
    [
        (OptionError, {"speculative_tree": "dynamic:12"}, "speculative_model is missing"),
        (OptionError, {"speculative_model": "[ngrm]"}, "did you mean 'ngram'"),
        (OptionError, {"speculative_model": "[eagle]/not/there"}, "'/not/there' is a path that"),
        (OptionError, {"speculative_model": "./not/there"}, "'./not/there' is a path that"),
        (OptionError, {"speculative_config": TREE_KEYS, "num_speculative_tokens": 4}, "=4 contr"),
        (OptionError, {"speculative_config": TREE_KEYS, "speculative_tree": "chain"}, "contradic"),
        (OptionError, {**TREE, "spec_method": "mtp"}, "spec_method='mtp' contradicts method"),
        (OptionError, {**TREE, "spec_tokens": 4}, "spec_tokens=4 contradicts"),
        (OptionError, {**TREE, "speculative_config": {"model": "x"}}, "none of its methods"),
        (OptionError, {**TREE, "worker_cls": "a.B"}, "worker_cls='a.B' takes the place"),
        (OptionError, {**TREE, "speculative_config": {"quantization": "fp8"}}, "no meaning for a"),
        (OptionError, {**TREE, "speculative_step_costs": "8:1,1:2"}, "step_costs='8:1,1:2' is no"),
        (OptionError, {**TREE, "speculative_config": {WIDTHS: [[1, 9, 2]]}}, "no meaning for a"),
        (OptionError, {"speculative_model": "[ngram]", "speculative_step_costs": "1:5"}, "a chain"),
        (OptionError, {"speculative_model": "[mtp3]"}, "needs heads for"),
        (OptionError, {"speculative_model": "[mtp]"}, "vllm-specplus train mtp3 --model "),
        (
            OptionError,
            {**TREE, "speculative_model": "[ngram+mtp3]"},
            "--prompts FILE --out DIR` and",
        ),
        (OptionError, {"speculative_config": {"method": "mtp3"}}, "and write '[mtp3]DIR'"),
        (
            OptionError,
            {
                "speculative_model": "[mtp3]m",
                "speculative_tree": f"static:{[(n,) for n in range(9)]}",
            },
            "has a node of rank 8, and [mtp3]m drafts 8 tokens after a node, ranks 0 to 7; leave",
        ),
        (NotBuiltError, {"speculative_model": "[eagle+suffix]m"}, "chains of [ngram], [mtp]"),
        (
            NotBuiltError,
            {**TREE, "speculative_model": "[medusa+ngram]m", "speculative_verify": "typical"},
            "is not available for trees of [medusa+ngram]m; use 'auto' or 'match'",
        ),
        (
            NotBuiltError,
            {**TREE, "speculative_model": "[ngram+suffix]"},
            "trees of [ngram], [draft]",
        ),
        (NotBuiltError, {**TREE, "speculative_verify": "typical"}, "use 'auto' or 'match'"),
        (NotBuiltError, {"speculative_model": "[ngram]", "speculative_verify": "match"}, "'block'"),
    ],
)
def test_refused(model: str, error: type[Exception], arguments: dict[str, Any], said: str) -> None:
    if "speculative_config" not in arguments or "method" in arguments["speculative_config"]:
        arguments = {"num_speculative_tokens": 5, **arguments}
    for spelled in (by_keywords, by_flags):
        with pytest.raises(error, match=r"^[^\n]*; [^\n]*\.$") as raised:
            spelled(model, **arguments)
        assert said in str(raised.value)


def test_drawn_trunks_are_refused_in_static_trees(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shape moves the trunk to other rows than those that it was drawn for."""
    monkeypatch.setattr(options, "tree_engine", lambda: host.V2_CPU_ENGINE)
    asked = {"speculative_model": f"[draft+ngram]{model}", "speculative_verify": "traversal"}
    drawn = by_keywords(model, **TREE | asked).speculative_config
    assert drawn["draft_sample_method"] == "probabilistic"
    with pytest.raises(NotBuiltError, match="speculative_verify='traversal' is not available"):
        by_keywords(model, **TREE | asked | {"speculative_tree": "static:[(0,),(1,)]"})


def test_a_home_path_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "head").mkdir()
    arguments = {"speculative_model": "[eagle]~/head", "num_speculative_tokens": 2}
    translated, _ = options.translate(arguments)
    assert translated["speculative_config"]["model"] == str(tmp_path / "head")


@pytest.mark.parametrize("version", [None, "0.31.2", "0.34.0", "1.0"])
def test_other_versions_of_vllm_are_refused(version: str | None) -> None:
    with pytest.raises(NotBuiltError, match=r"vLLM version=.*install vllm>=0.32,<0.34"):
        host.check_version(version)


@pytest.mark.parametrize(
    ("path", "parameters", "said"),
    [
        ("CPUModelRunner._renamed", "", "_renamed was not found"),
        ("CPUModelRunner._sample", "spec_decode_metadata logits", "wanted spec_decode_metadata lo"),
    ],
)
def test_a_missing_hook_is_named(
    model: str, monkeypatch: pytest.MonkeyPatch, path: str, parameters: str, said: str
) -> None:
    assert [hook for hook in host.check_hooks() if hook.missing] == []
    monkeypatch.setitem(host.HOST_METHODS, path, parameters)
    with pytest.raises(NotBuiltError, match=rf"^{path} was not found as wanted") as error:
        by_keywords(model, **TREE)
    assert said.split()[-1] in str(error.value)


@pytest.mark.parametrize(
    ("modules", "hooks"),
    [
        (("attention", "v1", "worker"), host.HOST_METHODS),
        (("attention", "v2", "v2_verifier", "v2_speculator", "worker_v2"), host.V2_HOST_METHODS),
    ],
)
def test_every_override_of_an_engine_is_a_checked_hook(
    modules: tuple[str, ...], hooks: dict[str, str]
) -> None:
    overridden = {
        f"{base.__name__}.{name}"
        for module in (import_module(f"vllm_specplus.engine.{name}") for name in modules)
        for cls in vars(module).values()
        if isinstance(cls, type) and cls.__module__ == module.__name__
        for base in cls.__bases__
        for name in vars(cls)
        if base.__module__.startswith("vllm.")
        if name == "__call__" or not name.startswith(("__", "_abc"))
        if hasattr(base, name)
    }
    assert len(overridden) > 10
    assert overridden - set(hooks) == set()


def test_the_v2_engine_finds_its_hooks() -> None:
    assert [hook for hook in host.check_hooks(host.V2_CPU_ENGINE) if hook.missing] == []


FRESH = {
    "keywords": "from vllm import EngineArgs as Args",
    "imported first": "import vllm_specplus\nfrom vllm import AsyncEngineArgs as Args",
}


@pytest.mark.slow
@pytest.mark.parametrize("how", FRESH)
def test_fresh_process(model: str, how: str) -> None:
    """Nothing of ours is imported by hand, unless vLLM is told not to ask platform plugins.

    The first import is arg_utils itself, which brings vLLM to call us when it is half imported.
    """
    script = (
        f"import json, sys\n{FRESH[how]}\na = Args(sys.argv[1], **json.loads(sys.argv[2]))\n"
        "print(json.dumps([a.speculative_config, a.additional_config, a.worker_cls]))"
    )
    env = os.environ | ({"VLLM_TARGET_DEVICE": "cpu"} if how == "imported first" else {})
    command = [sys.executable, "-c", script, model, json.dumps(TREE)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == list(outcome(by_keywords(model, **TREE)))


@pytest.mark.slow
def test_llm_refuses_before_any_process_starts(model: str) -> None:
    script = (
        "import multiprocessing, sys\nfrom vllm import LLM\ntry:\n"
        "    LLM(sys.argv[1], speculative_model='[ngram]', num_speculative_tokens=0)\n"
        "except ValueError as error:\n"
        "    print(error, multiprocessing.active_children())"
    )
    env = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    command = [sys.executable, "-c", script, model]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    last = done.stdout.splitlines()[-1]
    assert last.startswith("num_speculative_tokens=0 is refused") and last.endswith(". []")


@pytest.mark.slow
def test_serve_ends_in_one_line(model: str) -> None:
    """A refusal that needs the whole VllmConfig, so it comes as late as refusals can."""
    flags = "--speculative-model [ngram] --num-speculative-tokens 3 --speculative-tree dynamic:9"
    command = [str(Path(sys.executable).with_name("vllm")), "serve", model]
    command += [*flags.split(), "--kv-cache-dtype", "fp8", "--skip-tokenizer-init"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stderr.splitlines()[-1].startswith("vllm: error: kv_cache_dtype='fp8' cannot be")
