"""Draft models of vLLM's in trees: what becomes of the options, and what is refused early."""

from __future__ import annotations

import re
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from vllm.config import SpeculativeConfig

from tests.engine.configs import LLAMA, MAMBA, write_config
from tests.startup.spellings import by_flags, by_keywords, outcome
from vllm_specplus.config import METHODS, parse_methods
from vllm_specplus.errors import NotBuiltError, OptionError
from vllm_specplus.startup import host, options
from vllm_specplus.startup.refusals import tree_refusals

DOC = Path(__file__).resolve().parents[2] / "docs/methods.md"
TREE = dict(num_speculative_tokens=3, speculative_tree="dynamic:8")


@pytest.fixture
def model(tmp_path: Path) -> str:
    return write_config(tmp_path / "target", LLAMA)


@pytest.mark.parametrize(
    ("method", "architecture"),
    [
        ("", "LlamaForCausalLM"),
        ("[draft+ngram]", "LlamaForCausalLM"),
        ("[eagle]", "EagleLlamaForCausalLM"),
        ("[eagle3+ngram]", "Eagle3LlamaForCausalLM"),
    ],
)
def test_on_the_v1_runner_our_engine_grows_their_trees(
    method: str, architecture: str, model: str, tmp_path: Path
) -> None:
    path = write_config(tmp_path / "draft", LLAMA | {"num_hidden_layers": 1})
    revised = {"revision": "v1"}
    asked = by_keywords(model, speculative_model=method + path, speculative_config=revised, **TREE)
    assert asked.worker_cls == host.CPU_ENGINE.worker_cls
    config = asked.create_engine_config()
    speculative = config.speculative_config
    assert (speculative.method, speculative.num_speculative_tokens) == (host.CPU_ENGINE.method, 8)
    draft = speculative.draft_model_config
    assert (draft.model, draft.revision, draft.architectures) == (path, "v1", [architecture])
    assert tree_refusals(config) == []


def test_two_draft_models(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In all spellings; on V2, and with one of another vocabulary, they are refused."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, size in (("a", 256), ("b", 256), ("c", 99)):
        write_config(tmp_path / name, LLAMA | {"vocab_size": size})
    text = f"[draft]~/a+[draft]{tmp_path}/b"
    wanted = outcome(by_keywords(model, speculative_model=text, **TREE))
    assert outcome(by_flags(model, speculative_model=text, **TREE)) == wanted
    keys: dict[str, Any] = {"method": "draft", "model": text.removeprefix("[draft]")}
    keys |= {"num_speculative_tokens": 3, "tree": "dynamic:8"}
    asked = by_keywords(model, speculative_config=keys)
    assert outcome(asked) == wanted
    drafters = asked.create_engine_config().speculative_config.specplus_drafters
    assert [d.draft_model_config.model for d in drafters] == [f"{tmp_path}/a", f"{tmp_path}/b"]
    wrong = f"[draft]{tmp_path}/a+[draft]{tmp_path}/c"
    with pytest.raises(OptionError, match="/c' has a vocabulary of 99 tokens"):
        by_keywords(model, speculative_model=wrong, **TREE).create_engine_config()
    with pytest.raises(OptionError, match="/d' is a path that does not exist"):
        by_keywords(model, speculative_model=f"[draft]~/a+[draft]{tmp_path}/d", **TREE)
    monkeypatch.setattr(options, "tree_engine", lambda: host.V2_CPU_ENGINE)
    with pytest.raises(NotBuiltError, match="is not available in the engine cpu-v2"):
        by_keywords(model, speculative_model=text, **TREE)


@pytest.mark.parametrize("engine", [host.CPU_ENGINE, host.V2_CPU_ENGINE])
@pytest.mark.parametrize("shape", [TREE, {"num_speculative_tokens": 3}])
def test_another_vocabulary_is_refused(
    engine: host.Engine,
    shape: dict[str, Any],
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM refuses it in four lines that name no option; where vLLM maps one vocabulary to the
    other, its chain may have two."""
    for name in ("tree_engine", "wanted_engine"):
        monkeypatch.setattr(options, name, lambda: engine)
    path = write_config(tmp_path / "draft", LLAMA | {"vocab_size": 99})
    check = SpeculativeConfig.verify_equal_vocab_size_if_draft_model
    said = rf"^speculative_model='{path}' has a vocabulary of 99 tokens, .* has 256; [^\n]*\.$"
    with pytest.raises(OptionError, match=said):
        by_keywords(model, speculative_model=path, **shape).create_engine_config()
    assert SpeculativeConfig.verify_equal_vocab_size_if_draft_model is check


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("parallel_config.tensor_parallel_size", 2, "tensor_parallel_size=2 .* on one rank"),
        ("parallel_config.data_parallel_size", 2, "data_parallel_size=2 .* on one rank"),
        (
            "speculative_config.draft_model_config.attention_chunk_size",
            64,
            "^speculative_model='.*draft' cannot .*: it has chunked local attention; use another",
        ),
    ],
)
def test_refused_on_the_v1_runner(
    field: str, value: int, said: str, model: str, tmp_path: Path
) -> None:
    path = write_config(tmp_path / "draft", LLAMA)
    config = by_keywords(model, speculative_model=path, **TREE).create_engine_config()
    *owners, name = field.split(".")
    setattr(reduce(getattr, owners, config), name, value)
    (sentence,) = tree_refusals(config)
    assert re.search(said, sentence)


def test_a_recurrent_draft_is_refused(model: str, tmp_path: Path) -> None:
    path = write_config(tmp_path / "draft", MAMBA)
    with pytest.raises(NotBuiltError, match=r"^speculative_model='.*' .* recurrent layers"):
        by_keywords(model, speculative_model=path, **TREE).create_engine_config()


def test_what_vllm_says_of_a_draft_is_left_to_vllm(model: str, tmp_path: Path) -> None:
    path = write_config(tmp_path / "draft", LLAMA)
    with pytest.raises(ValueError, match="draft_tensor_parallel_size=3"):
        by_keywords(
            model,
            speculative_model=path,
            num_speculative_tokens=3,
            speculative_config={"draft_tensor_parallel_size": 3},
        ).create_engine_config()


def test_the_document_shows_which_engine_has_trees_of_what() -> None:
    rows = [line.split(" | ") for line in DOC.read_text().splitlines() if line.startswith("| `")]
    named = set()
    for spelled, _, _, v1_tree, _, v2_tree in rows[1:]:
        for text in re.findall("`([^`]+)`", spelled):
            specs = parse_methods(text)
            name = "+".join(spec.name for spec in specs)
            named.add(name)
            assert (v1_tree == "ours") == (name in host.CPU_ENGINE.methods), text
            assert (v2_tree == "ours |") == (name in host.V2_ENGINE.methods), text
    assert METHODS.keys() <= named
