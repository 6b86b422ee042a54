"""The table of models with MTP modules, against vLLM's own code, and what the options make of it.

Sabotages seen to fail: a row taken out, a wrong field, `where` or target, a count that vLLM's
class cannot run.
"""

from __future__ import annotations

import logging
import pickle
from functools import reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from packaging.version import Version
from transformers import PretrainedConfig
from vllm.config import SpeculativeConfig
from vllm.config.speculative import MTPModelTypes

from tests.engine.configs import LLAMA, write_config
from tests.startup.spellings import by_keywords
from vllm_specplus.core.mtp_models import MTP_MODELS, NEXTN, NOT_MODULES, MTPModel
from vllm_specplus.startup import host
from vllm_specplus.startup.mtp_modules import count_modules, counted_modules
from vllm_specplus.startup.refusals import tree_refusals

DOC = Path(__file__).resolve().parents[2] / "docs/mtp-models.md"
NEW_IN_33 = {"step5_mtp"}
VLLM_READS = {"mimo_v2_mtp": 1, "glm_ocr_mtp": None}
"""Where vLLM reads another count than three: pinned to one, and looked for at the wrong level."""
ROWS = [(name, target) for name, row in MTP_MODELS.items() for target in row.targets]
TESTS = {
    "glm4_moe_mtp": "`experts: mtp` and `experts: mtp3`, 1, 2 and 3 modules, chain and tree",
    "qwen3_next_mtp": "`experts: mtp3, qwen, 3 modules`",
    "mimo_v2_mtp": "`experts: mtp3, mimo v2, 3 modules`",
    "mimo_mtp": "`drafter: mtp3, mimo, trunk`",
}
"""What runs in `tests/engine/v2_drafters.py`; of the others only the config is tested."""


def config(row: MTPModel, target: str, count: int | None) -> PretrainedConfig:
    """What a checkpoint's config.json would make, with the count where `row` says."""
    fields: dict[str, Any] = {} if count is None else {row.field: count}
    base: dict[str, Any] = dict(num_hidden_layers=2, layer_types=["full_attention"] * 2, hc_count=1)
    base |= dict(mtp_num_experts=2, mtp_num_experts_per_tok=1, num_attention_heads=2)
    is_type = target == target.lower()
    top = PretrainedConfig(**base, architectures=["LlamaForCausalLM" if is_type else target])
    top.model_type = target if is_type else "none"
    if row.where == "mtp_config":
        top.mtp_config = fields
    elif target.endswith(("_vl", "_preview", "_mobius")) or "Conditional" in target:
        top.text_config = PretrainedConfig(**base, **fields)
        top.text_config.architectures = ["LlamaForCausalLM"]
    else:
        top.update(fields)
    return top


def test_the_table_has_every_mtp_model_type_of_vllm() -> None:
    assert not MTP_MODELS.keys() & NOT_MODULES.keys()
    old = Version(host.vllm_version() or "0") < Version("0.33.dev0")
    ours = MTP_MODELS.keys() | NOT_MODULES.keys()
    assert ours - (NEW_IN_33 if old else set()) == set(get_args(MTPModelTypes))


@pytest.mark.parametrize(("name", "target"), ROWS)
def test_vllm_reads_the_same_field(name: str, target: str) -> None:
    row = MTP_MODELS[name]
    fields = config(row, target, 3).to_dict()
    assert row.count(fields) == 3
    if name in NEW_IN_33 and name not in get_args(MTPModelTypes):
        pytest.skip("vLLM 0.33 alone has it; that we find its count was tested")
    draft = SpeculativeConfig.hf_config_override(config(row, target, 3))
    assert draft.model_type == name
    assert draft.n_predict == VLLM_READS.get(name, 3)
    counted = count_modules(SpeculativeConfig.hf_config_override, 5, config(row, target, 3))
    assert counted.model_type == name
    if row.runs == 1:
        assert not hasattr(counted, "specplus_num_modules")
    else:
        assert (getattr(counted, NEXTN), counted.n_predict, counted.specplus_num_modules) == (
            5,
            5,
            3,
        )
        speculative = SimpleNamespace(
            method="mtp",
            draft_model_config=SimpleNamespace(hf_config=counted),
            num_speculative_tokens=5,
        )
        assert SpeculativeConfig.use_multi_module_mtp(speculative)


def test_chains() -> None:
    row = MTP_MODELS["glm4_moe_mtp"]
    assert [row.chain(num, 3) for num in (1, 2, 3, 8)] == [
        (1, 1, 1),
        (1, 2, 2),
        (1, 2, 3),
        (1, 2, 3),
    ]
    assert MTP_MODELS["nemotron_h_mtp"].chain(2, 3) == (1, 1, 1)


GLM = LLAMA | {"model_type": "glm4_moe", "architectures": ["Glm4MoeForCausalLM"]}


@pytest.mark.parametrize(
    ("num", "said"),
    [
        (1, "1 MTP module; the 3 drafts come from module 1, unrolled"),
        (2, "2 MTP modules; the 3 drafts come from modules 1, 2, 2, each fed the hidden state of "),
        (3, "3 MTP modules; the 3 drafts come from modules 1, 2, 3, each fed the hidden state of "),
    ],
)
def test_several_modules_run_in_our_worker(
    num: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = write_config(tmp_path, GLM | {NEXTN: num})
    monkeypatch.setattr("vllm_specplus.startup.options.wanted_engine", lambda: host.V2_ENGINE)
    monkeypatch.setattr("vllm_specplus.startup.mtp_modules.tree_engine", lambda: host.V2_ENGINE)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level("INFO", "vllm.specplus"):
        arguments = by_keywords(model, speculative_model="[mtp3]")
    assert arguments.speculative_config == {"method": "mtp", "num_speculative_tokens": 3}
    assert arguments.worker_cls == ("auto" if num == 1 else host.V2_ENGINE.modules_worker_cls)
    assert said in caplog.text
    own = by_keywords(model, speculative_model="[mtp]")
    assert own.speculative_config == {"method": "mtp", "num_speculative_tokens": num}


@pytest.mark.parametrize("tree", ["chain", "dynamic:8"])
@pytest.mark.parametrize("num", [1, 2, 3])
def test_on_the_v1_runner_they_are_drafted_with_by_our_engine(
    num: int, tree: str, tmp_path: Path
) -> None:
    model = write_config(tmp_path, GLM | {NEXTN: num})
    asked = by_keywords(model, speculative_model="[mtp3]", speculative_tree=tree)
    native = num == 1 and tree == "chain"
    assert asked.worker_cls == ("auto" if native else host.CPU_ENGINE.worker_cls)
    options = asked.create_engine_config().speculative_config
    assert options.method == ("mtp" if native else host.CPU_ENGINE.method)
    assert options.num_speculative_tokens == (8 if tree == "dynamic:8" else 3)
    draft = options.draft_model_config.hf_config
    assert draft.architectures == ["Glm4MoeMTPModel"]
    assert draft.n_predict == (1 if num == 1 else 3)
    assert getattr(draft, "specplus_num_modules", 1) == num


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("model_config.attention_chunk_size", 64, "several MTP modules on vLLM's V1 runner: it ha"),
        ("parallel_config.tensor_parallel_size", 2, "draft on one rank"),
        ("parallel_config.data_parallel_size", 2, "draft on one rank"),
    ],
)
def test_refused_on_the_v1_runner(field: str, value: int, said: str, tmp_path: Path) -> None:
    model = write_config(tmp_path, GLM | {NEXTN: 2})
    config = by_keywords(model, speculative_model="[mtp3]").create_engine_config()
    assert tree_refusals(config) == []
    *owners, name = field.split(".")
    setattr(reduce(getattr, owners, config), name, value)
    (sentence,) = tree_refusals(config)
    assert said in sentence
    assert sentence.endswith("={'method': 'mtp', 'num_speculative_tokens': 2}.")


def test_only_our_workers_get_another_config() -> None:
    compose = SpeculativeConfig.compose_draft_hf_overrides
    keys = {"method": "mtp", "num_speculative_tokens": 5}
    stock = SimpleNamespace(worker_cls="auto", speculative_config=keys)
    ours = SimpleNamespace(worker_cls=host.V2_ENGINE.modules_worker_cls, speculative_config=keys)
    with counted_modules(stock):
        assert SpeculativeConfig.compose_draft_hf_overrides is compose
    with counted_modules(ours):
        override = SpeculativeConfig.compose_draft_hf_overrides(None)
    assert SpeculativeConfig.compose_draft_hf_overrides is compose
    override = pickle.loads(pickle.dumps(override))  # it goes to other processes
    assert override(config(MTP_MODELS["glm4_moe_mtp"], "Glm4MoeForCausalLM", 2)).n_predict == 5


def test_the_document_shows_the_table() -> None:
    lines = [
        f"| {row.name} | `{name}` | {_field(row)} | {_used(row)} | {row.hidden_state_from or '-'} "
        f"| {row.source} | {TESTS.get(name, 'config')} |"
        for name, row in MTP_MODELS.items()
    ]
    shown = [line for line in DOC.read_text().splitlines() if line.startswith("| ")]
    assert [line for line in shown if "`" in line and "_mtp`" in line] == lines
    assert all(f"`{name}`: {why}" in DOC.read_text() for name, why in NOT_MODULES.items())


def _field(row: MTPModel) -> str:
    where = "" if row.where == "text_config" else f"{row.where}."
    return f"`{where}{row.field}`" + (f", else {row.default}" if row.default else "")


def _used(row: MTPModel) -> str:
    return "1, unrolled" if row.runs == 1 else "all"
