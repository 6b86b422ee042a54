"""Tiny targets with a vocabulary so small that untrained drafters are right now and then.

Written for vLLM's own drafters: a draft model, EAGLE and EAGLE-3 heads, and targets with MTP
modules of their own: GLM-4.5 with one, two and three, Qwen3-Next and MiMo-V2 with three, MiMo
with one. Their weights are random, so only what they accept is compared. Of our own heads there
are fitted ones.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from tests.engine.engines import model_path
from tests.engine.heads import fitted
from tests.engine.models import COMMON, MAX_MODEL_LEN, TINY_VOCAB_SIZE, llama, randomize

NUM_LAYERS = 2
AUX_LAYERS = [0, 1]
DRAFT_VOCAB = [0, 1, 3, 4, 6, 8, 9, 11]
HIDDEN: Any = COMMON["hidden_size"]
HEADS: dict[str, Any] = dict(hidden_state_from="previous", tied=False)
"""How our own heads are fitted."""
MARK = 40.0


def _write(path: Path, weights: dict[str, torch.Tensor], config: dict) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    save_file({name: w.contiguous() for name, w in weights.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * shape[-1] ** -0.5


def _layer() -> dict[str, torch.Tensor]:
    """One random Llama layer that adds little, names from "layers.0." on."""
    config = LlamaConfig(vocab_size=TINY_VOCAB_SIZE, num_hidden_layers=1, **COMMON)
    weights = randomize(LlamaForCausalLM(config), seed=7).state_dict()
    return {n.removeprefix("model."): _quiet(n, w) for n, w in weights.items() if ".layers." in n}


def _quiet(name: str, weight: torch.Tensor) -> torch.Tensor:
    """A layer's last projections, so much smaller that what enters the layer still decides."""
    return weight * (0.2 if "o_proj" in name or "down_proj" in name else 1)


@torch.no_grad()
def _next_hidden(model: PreTrainedModel, normed: bool, ahead: int = 1) -> torch.Tensor:
    """The linear map from [embedding of the token `ahead` places on, hidden state] to the hidden
    state there that errs least on random text: [hidden_size, 2 * hidden_size]."""
    ids = torch.randint(TINY_VOCAB_SIZE, (64, 48), generator=torch.Generator().manual_seed(6))
    hidden = model.model(ids).last_hidden_state
    embeddings = model.get_input_embeddings()(ids)
    parts = [embeddings[:, ahead:], hidden[:, :-ahead]]
    if normed:
        parts = [part * part.square().mean(-1, keepdim=True).rsqrt() for part in parts]
    inputs = torch.cat(parts, -1).flatten(0, 1)
    # Inputs that hardly vary decide nothing, or the last bits of a sum would decide the drafts.
    return (torch.linalg.pinv(inputs, rtol=1e-3) @ hidden[:, ahead:].flatten(0, 1)).T


def _target() -> PreTrainedModel:
    return randomize(llama(TINY_VOCAB_SIZE), seed=3)


def target(path: Path) -> Path:
    _target().save_pretrained(path)
    return path


def draft(path: Path) -> Path:
    """The target with noise."""
    model = _target()
    for index, weight in enumerate(model.parameters()):
        if weight.dim() == 2:
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(index))
            weight.data += 0.3 * noise * weight.std()
    model.save_pretrained(path)
    return path


def small_draft(path: Path, max_len: int) -> Path:
    """A random model whose keys and values have other sizes than the target's."""
    sizes: Any = COMMON | dict(hidden_size=32, num_attention_heads=2, num_key_value_heads=1)
    sizes |= dict(head_dim=32, max_position_embeddings=max_len)
    config = LlamaConfig(vocab_size=TINY_VOCAB_SIZE, num_hidden_layers=1, **sizes)
    randomize(LlamaForCausalLM(config), seed=13).save_pretrained(path)
    return path


def eagle(path: Path) -> Path:
    weights = _layer() | {"fc.weight": _next_hidden(_target(), normed=False)}
    weights.pop("layers.0.input_layernorm.weight")
    config = LlamaConfig(vocab_size=TINY_VOCAB_SIZE, num_hidden_layers=1, **COMMON).to_dict()
    return _write(path, weights, config | {"architectures": ["LlamaForCausalLM"]})


def eagle3(path: Path, draft_vocab: list[int] | None = None) -> Path:
    """With a `draft_vocab`, only these tokens are drafted."""
    weights = {n.replace("layers.0", "midlayer"): w for n, w in _layer().items()}
    for name in ("q", "k", "v"):
        key = f"midlayer.self_attn.{name}_proj.weight"
        weights[key] = _random(len(weights[key]), 2 * HIDDEN, seed=ord(name))
    weights |= {
        "midlayer.hidden_norm.weight": torch.ones(HIDDEN),
        "norm.weight": torch.ones(HIDDEN),
        "fc.weight": _random(HIDDEN, len(AUX_LAYERS) * HIDDEN, seed=9),
        "lm_head.weight": _random(TINY_VOCAB_SIZE, HIDDEN, seed=10),
    }
    config = LlamaConfig(vocab_size=TINY_VOCAB_SIZE, num_hidden_layers=1, **COMMON).to_dict()
    config |= {"num_aux_hidden_states": 2, "eagle_aux_hidden_state_layer_ids": AUX_LAYERS}
    if draft_vocab is not None:
        weights["d2t"] = torch.tensor(draft_vocab) - torch.arange(len(draft_vocab))
        weights["lm_head.weight"] = weights["lm_head.weight"][draft_vocab]
        config["draft_vocab_size"] = len(draft_vocab)
    return _write(path, weights, config | {"architectures": ["LlamaForCausalLMEagle3"]})


@torch.no_grad()
def glm(path: Path, num_modules: int, hidden_state_from: str = "previous") -> Path:
    """A dense GLM-4.5 with MTP modules, whose layers are noisy copies of the target's last.

    Feature 0 is 0 in the target's hidden states and MARK in those of the modules, where it makes
    the rest look smaller: modules that read the other kind than they expect read it wrongly.
    """
    config = Glm4MoeConfig(
        vocab_size=TINY_VOCAB_SIZE,
        num_hidden_layers=NUM_LAYERS,
        first_k_dense_replace=NUM_LAYERS - 1,
        n_routed_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=HIDDEN,
        num_nextn_predict_layers=num_modules,
        **COMMON,
    )
    model = randomize(Glm4MoeForCausalLM(config), seed=4)
    model.model.norm.weight[0] *= num_modules == 1
    model.save_pretrained(path)
    weights = load_file(path / "model.safetensors")
    last = f"model.layers.{NUM_LAYERS - 1}."
    embeddings = model.get_input_embeddings().weight
    embeddings = embeddings * embeddings.square().mean(-1, keepdim=True).rsqrt()
    mark = MARK * (num_modules > 1)
    marking = mark * torch.linalg.lstsq(embeddings, torch.ones(len(embeddings), 1)).solution[:, 0]
    ones, unmarked = torch.ones(HIDDEN), torch.full((HIDDEN,), (1 + mark**2 / HIDDEN) ** 0.5)
    unmarked[0] = mark == 0
    for module in range(num_modules):
        name = f"model.layers.{NUM_LAYERS + module}."
        for key in [key for key in weights if key.startswith(last)]:
            weights[key.replace(last, name)] = _quiet(key, weights[key]).clone()
        for norm in ("input_layernorm", "post_attention_layernorm", "shared_head.norm"):
            weights[f"{name}{norm}.weight"] = unmarked.clone()
        from_target = hidden_state_from == "target"
        eh_proj = _next_hidden(model, normed=True, ahead=1 + module * from_target)
        if from_target:
            eh_proj[:, HIDDEN] = _random(HIDDEN, 1, seed=21)[:, 0]
        else:
            eh_proj += 0.3 * module * _random(*eh_proj.shape, seed=20)
        if mark:
            eh_proj[0] = torch.cat([marking, torch.zeros(HIDDEN)])
        weights[f"{name}eh_proj.weight"] = eh_proj
        weights[f"{name}enorm.weight"] = ones.clone()
        weights[f"{name}hnorm.weight"] = (ones if from_target or not module else unmarked).clone()
        weights[f"{name}shared_head.head.weight"] = weights["lm_head.weight"].clone()
        weights[f"{name}embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
    return _write(path, weights, json.loads((path / "config.json").read_text()))


def qwen(path: Path, num_modules: int) -> Path:
    """Qwen3-Next of full attention alone, whose MTP class leaves the choice of the module to its
    inner model. One projection for all modules; their layers are the target's last, ever quieter.
    """
    config = Qwen3NextConfig(
        vocab_size=TINY_VOCAB_SIZE,
        num_hidden_layers=NUM_LAYERS,
        layer_types=["full_attention"] * NUM_LAYERS,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=HIDDEN,
        shared_expert_intermediate_size=HIDDEN,
        num_nextn_predict_layers=num_modules,
        **COMMON,
    )
    model = randomize(Qwen3NextForCausalLM(config), seed=8)
    model.save_pretrained(path)
    weights = load_file(path / "model.safetensors")
    last = f"model.layers.{NUM_LAYERS - 1}."
    for module in range(num_modules):
        for key in [key for key in weights if key.startswith(last)]:
            name = key.replace(last, f"mtp.layers.{module}.")
            weights[name] = _quiet(key, weights[key]) * (1 - 0.2 * module)
    for norm in ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding"):
        weights[f"mtp.{norm}.weight"] = torch.zeros(HIDDEN)  # one is added
    weights["mtp.fc.weight"] = _next_hidden(model, normed=True)
    return _write(path, weights, json.loads((path / "config.json").read_text()))


def mimo(path: Path) -> Path:
    """MiMo-7B with its one module, whose layer is the target's last."""
    sizes: Any = COMMON | {"num_attention_heads": 2}  # its heads have hidden_size // 2 features
    config = Qwen2Config(vocab_size=TINY_VOCAB_SIZE, num_hidden_layers=NUM_LAYERS, **sizes)
    model = randomize(Qwen2ForCausalLM(config), seed=9)
    model.save_pretrained(path)
    weights = load_file(path / "model.safetensors")
    last, module = f"model.layers.{NUM_LAYERS - 1}.", "model.mtp_layers.0."
    for key in [key for key in weights if key.startswith(last)]:
        weights[key.replace(last, module)] = _quiet(key, weights[key]).clone()
    for norm in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
        weights[f"{module}{norm}.weight"] = torch.ones(HIDDEN)
    embedding, hidden = _next_hidden(model, normed=True).chunk(2, 1)
    weights[f"{module}input_proj.weight"] = torch.cat([hidden, embedding], 1)
    fields = json.loads((path / "config.json").read_text())
    fields |= {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    return _write(path, weights, fields)


def mimo_v2(path: Path, num_modules: int) -> Path:
    """A dense MiMo-V2 whose modules, over sliding windows, read the target's own hidden state."""
    config = LlamaConfig(vocab_size=TINY_VOCAB_SIZE, num_hidden_layers=NUM_LAYERS, **COMMON)
    model = randomize(LlamaForCausalLM(config), seed=12)
    model.save_pretrained(path)
    weights = load_file(path / "model.safetensors")
    last = f"model.layers.{NUM_LAYERS - 1}."
    for module in range(num_modules):
        name = f"model.mtp.layers.{module}."
        for key in [key for key in weights if key.startswith(last)]:
            renamed = key.replace("post_attention_layernorm", "pre_mlp_layernorm")
            weights[renamed.replace(last, name)] = _quiet(key, weights[key]).clone()
        gain = 1.0 + module  # vLLM keeps its matrices packed on CPUs, so tests compare gains
        for norm in ("enorm", "hnorm"):
            weights[f"{name}{norm}.weight"] = torch.full((HIDDEN,), gain)
        weights[f"{name}final_layernorm.weight"] = torch.ones(HIDDEN)
        eh_proj = _next_hidden(model, normed=True, ahead=1 + module)
        weights[f"{name}eh_proj.weight"] = eh_proj / gain
    fields = config.to_dict()
    heads = {key: fields[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim")}
    fields |= {f"swa_{key}": value for key, value in heads.items()} | {
        "architectures": ["MiMoV2FlashForCausalLM"],
        "model_type": "mimo_v2_flash",
        "num_nextn_predict_layers": num_modules,
        "layernorm_epsilon": config.rms_norm_eps,
        "hybrid_layer_pattern": [0] * NUM_LAYERS,
        "moe_layer_freq": [0] * NUM_LAYERS,
        "n_routed_experts": 2,
        "sliding_window_size": 16,
        "v_head_dim": config.head_dim,
        "swa_v_head_dim": config.head_dim,
    }
    return _write(path, weights, fields)


BUILDERS = {
    "target": target,
    "draft": draft,
    "eagle": eagle,
    "eagle3": eagle3,
    "eagle3 reduced": lambda path: eagle3(path, DRAFT_VOCAB),
    "small draft": lambda path: small_draft(path, MAX_MODEL_LEN),
    "short draft": lambda path: small_draft(path, 48),
    "glm1": lambda path: glm(path, 1),
    "glm2": lambda path: glm(path, 2),
    "glm3": lambda path: glm(path, 3),
    "llama": lambda _: Path(model_path("llama")),
    "sliding": lambda _: Path(model_path("sliding")),
    "heads": lambda _: Path(fitted("llama", **HEADS)[0]),
    "mimo": mimo,
    "mimo_v2": lambda path: mimo_v2(path, 3),
    "qwen3": lambda path: qwen(path, 3),
    "glm3 from target": lambda path: glm(path, 3, "target"),
}


@cache
def drafter_path(name: str) -> str:
    return str(BUILDERS[name](Path(mkdtemp(prefix=f"specplus-{name.split()[0]}-"))))
