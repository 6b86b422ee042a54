"""Files of heads: what is written comes back, and what is wrong is refused in one sentence.

Sabotages that were caught: one scale for all rows, int8 rounded towards zero, tied modules
stored twice, any one check of `_check` left out, q and k swapped in the speculators import.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.proposers.heads.heads import config, modules
from vllm_specplus.errors import OptionError, SpecPlusError
from vllm_specplus.proposers.heads.checkpoint import (
    HeadsConfig,
    load_heads,
    module_shapes,
    save_heads,
)
from vllm_specplus.proposers.heads.files import check_fits, embedding_sha256

SHIPPED = Path(__file__).resolve().parents[3] / "assets/gemma-3-270m-mtp3"
VOCAB = torch.tensor([5, 2, 9, 0])


def saved(folder: Path, int8: bool = False, **changes: Any) -> tuple[Path, list[dict[str, Tensor]]]:
    about = config(draft_vocab_size=len(VOCAB), **changes)
    weights = modules(about)
    save_heads(folder, about, weights, VOCAB, int8=int8)
    return folder, weights


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_comes_back(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    about = config(tied=tied, qk_norm=True, training={"minutes": 3})
    weights = [{n: t.to(dtype) for n, t in module.items()} for module in modules(about)]
    save_heads(tmp_path / "a", about, weights)
    loaded = load_heads(tmp_path / "a")
    assert loaded.config == about and loaded.draft_vocab is None
    for depth in range(5):  # past the last module, that one goes on
        expected = weights[0 if tied else min(depth, 2)]
        module = loaded.module(depth)
        assert module.keys() == expected.keys()
        assert all(torch.equal(module[name], tensor) for name, tensor in expected.items())
        assert {tensor.dtype for tensor in module.values()} == {dtype}


def test_a_revision_of_the_hub_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = tmp_path / "models--org--heads"
    for commit, ref, target in (("1" * 40, "main", "new"), ("2" * 40, "v1", "old")):
        save_heads(repo / "snapshots" / commit, about := config(target=target), modules(about))
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / ref).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert load_heads("org/heads").config.target == "new"
    assert load_heads("org/heads", "v1").config.target == "old"


def test_int8_is_half_a_step_near(tmp_path: Path) -> None:
    folder, weights = saved(tmp_path, int8=True)
    loaded = load_heads(folder)
    assert loaded.draft_vocab is not None and loaded.draft_vocab.dtype == torch.int64
    assert torch.equal(loaded.draft_vocab, VOCAB)
    for depth, module in enumerate(weights):
        for name, weight in module.items():
            got = loaded.module(depth)[name]
            is_int8 = weight.dim() == 2 and name != "eh_proj.weight"
            step = weight.abs().amax(1, keepdim=True) / 127 if is_int8 else 0 * weight
            assert ((got - weight).abs() <= 0.501 * step).all(), name
    assert (tmp_path / "model.safetensors").stat().st_size < sum(
        2 * w.numel() for module in weights for w in module.values()
    ) + 10_000


def _edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(fields | changes))

    return edit


def _edit_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


def _cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


GATE = "mtp.1.mlp.gate_up_proj.weight"
DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
    (lambda folder: (folder / "config.json").write_text("{"), "that is no JSON"),
    (lambda folder: (folder / "config.json").write_text("[]"), "that is no object"),
    (_cut, "cannot be read"),
    (_edit_config(num_modules=0), "'num_modules' is wrong"),
    (_edit_config(colour="red"), "'colour' is wrong"),
    (_edit_config(hidden_state_from="next"), "'hidden_state_from' is wrong"),
    (_edit_config(num_modules=4), "lack the tensor 'mtp.3."),
    (_edit_config(num_modules=2), "have a tensor 'mtp.2."),
    (_edit_config(qk_norm=True), "lack the tensor 'mtp.0.self_attn.k_norm.weight'"),
    (_edit_config(intermediate_size=24), "config.json asks for (12, 24)"),
    (_edit_config(draft_vocab_size=None), "have a draft_vocab of 4, config.json says None"),
    (_edit_tensors(lambda t: t.pop(GATE)), f"lack the tensor '{GATE}'"),
    (_edit_tensors(lambda t: t[GATE][3].fill_(torch.nan)), f"have NaN or infinity in '{GATE}'"),
    (
        _edit_tensors(lambda t: t.update({GATE: t[GATE].to(torch.int8)})),
        f"lack the tensor '{GATE}_s",
    ),
    (_edit_tensors(lambda t: t.update({GATE: t[GATE].to(torch.int32)})), "where a float belongs"),
    (_edit_tensors(lambda t: t["draft_vocab"].fill_(3)), "negative or repeated ids"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGES, ids=[said for _, said in DAMAGES])
def test_damage_is_refused(tmp_path: Path, damage: Callable[[Path], object], said: str) -> None:
    folder, _ = saved(tmp_path)
    load_heads(folder)
    damage(folder)
    with pytest.raises(OptionError) as refused:
        load_heads(folder)
    message = str(refused.value)
    assert said in message and message.startswith("heads=") and message.endswith(".")
    assert "\n" not in message


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is no folder, and the hub has no such heads"):
        load_heads(tmp_path / "nowhere")


def test_wrong_modules_are_not_written(tmp_path: Path) -> None:
    about = config()
    with pytest.raises(OptionError, match=r"lack the tensor 'mtp\.2"):
        save_heads(tmp_path / "a", about, modules(about)[:2])
    assert not (tmp_path / "a").exists()


def test_fit(tmp_path: Path) -> None:
    loaded = load_heads(saved(tmp_path)[0])
    check_fits(loaded, hidden_size=12, vocab_size=10)
    with pytest.raises(OptionError, match="have hidden_size 12, but the model has 16"):
        check_fits(loaded, hidden_size=16, vocab_size=10)
    with pytest.raises(OptionError, match="draft token 9, but the model has 9 tokens"):
        check_fits(loaded, hidden_size=12, vocab_size=9)
    loaded = load_heads(saved(tmp_path, vocab_size=11)[0])
    with pytest.raises(OptionError, match="have vocab_size 11, but the model has 10"):
        check_fits(loaded, hidden_size=12, vocab_size=10)


def test_embedding_hash_knows_the_model_but_not_its_dtype() -> None:
    rows = torch.randn(300, 4).bfloat16()
    assert embedding_sha256(rows) == embedding_sha256(rows.float())
    assert embedding_sha256(rows) != embedding_sha256(rows.roll(1, 0))


def test_shipped_heads() -> None:
    """6.4M weights in int8 for Gemma-3-270M, with provenance and Google's terms."""
    loaded = load_heads(SHIPPED)
    check_fits(loaded, hidden_size=640, vocab_size=262_144)
    assert loaded.config.tied and loaded.config.num_modules == 3
    assert loaded.config.training["token_passes"] == 7_652_919
    assert sum(t.numel() for t in loaded.module(0).values()) == 6_394_752
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 20e6
    assert "Gemma Terms of Use" in (SHIPPED / "NOTICE").read_text()


def _speculators(folder: Path) -> dict[str, Tensor]:
    about = config(qk_norm=True, tied=True)
    [module] = modules(about)
    renamed = {"eh_proj": "input_proj", "enorm": "token_layernorm", "hnorm": "hidden_layernorm"}
    renamed |= {"final_norm": "final_layernorm"}
    tensors: dict[str, Tensor] = {}
    for name, tensor in module.items():
        stem = name.removesuffix(".weight")
        if stem == "self_attn.qkv_proj":
            parts = dict(zip("qkv", tensor.split([16, 8, 8]), strict=True))
            tensors |= {f"self_attn.{part}_proj": rows for part, rows in parts.items()}
        elif stem == "mlp.gate_up_proj":
            tensors |= {"mlp.gate_proj": tensor[:20], "mlp.up_proj": tensor[20:]}
        else:
            tensors[renamed.get(stem, stem)] = tensor
    folder.mkdir(exist_ok=True)
    stored = {f"mtp_layers.0.{name}.weight": t.contiguous() for name, t in tensors.items()}
    save_file(stored, folder / "model.safetensors")
    layer = about.model_dump(include=set(HeadsConfig.model_fields) - {"model_type", "rope_theta"})
    fields = {
        "speculators_model_type": "mtp",
        "architectures": ["MTPDraftModel"],
        "num_nextn_predict_layers": 1,
        "transformer_layer_config": layer
        | {"model_type": "qwen3", "rope_parameters": {"rope_theta": 100.0}},
        "speculators_config": {
            "algorithm": "mtp",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
            "verifier": {"name_or_path": "Qwen/Qwen3-8B"},
        },
    }
    (folder / "config.json").write_text(json.dumps(fields))
    return module


def test_speculators_format(tmp_path: Path) -> None:
    module = _speculators(tmp_path)
    loaded = load_heads(tmp_path)
    about = loaded.config
    assert (about.target, about.num_modules, about.tied) == ("Qwen/Qwen3-8B", 3, True)
    assert (about.hidden_state_from, about.qk_norm, about.rope_theta) == ("previous", True, 100.0)
    assert module_shapes(about) == module_shapes(config(qk_norm=True))
    assert all(torch.equal(loaded.module(2)[name], tensor) for name, tensor in module.items())


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            _edit_config(transformer_layer_config={"model_type": "qwen3_next"}),
            "kinds that can: qwen3",
        ),
        (_edit_config(speculators_config={}), "lack 'proposal_methods' of their format"),
        (
            _edit_tensors(lambda t: t.pop("mtp_layers.0.self_attn.k_proj.weight")),
            "lack 'self_attn.k",
        ),
        (_edit_tensors(lambda t: t.update(x=torch.ones(1))), "have a tensor 'mtp.0.x'"),
    ],
)
def test_speculators_that_cannot_be_imported(
    tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    _speculators(tmp_path)
    damage(tmp_path)
    with pytest.raises(SpecPlusError, match="heads=") as refused:
        load_heads(tmp_path)
    assert said in str(refused.value)
