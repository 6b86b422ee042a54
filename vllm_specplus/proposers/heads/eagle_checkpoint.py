"""The file format of EAGLE heads: what vLLM loads as `EagleLlamaForCausalLM`.

A folder with config.json, that of a Llama with one layer (what is not Llama's is under "specplus"),
and model.safetensors or the authors' pytorch_model.bin with `fc.weight` and `layers.0.{name}`.
Embedding and head are the target's own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor
from transformers import LlamaConfig

from vllm_specplus.errors import not_built
from vllm_specplus.proposers.heads import files
from vllm_specplus.proposers.heads.checkpoint import HeadsConfig
from vllm_specplus.proposers.heads.files import CONFIG, WEIGHTS, corrupted

_MERGED = {"self_attn.qkv_proj": "qkv", "mlp.gate_up_proj": ("gate", "up")}
_ABOUT = "specplus"
_FIXED = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "vocab_size",
    "max_position_embeddings",
)


class EagleConfig(HeadsConfig):
    """One module that is unrolled, each step on the hidden state of the one before."""

    num_modules: PositiveInt = 1
    tied: bool = True
    hidden_state_from: Any = "previous"
    hidden_act: str = "silu"
    max_position_embeddings: PositiveInt


def head_shapes(config: EagleConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors; queries, keys, values are one matrix here, gate and up too.

    `fc` takes [embedding, hidden state] in this order.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    return {
        "fc.weight": (hidden, 2 * hidden),
        "self_attn.qkv_proj.weight": (queries + 2 * keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_up_proj.weight": (2 * inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }


@dataclass(frozen=True, slots=True)
class EagleCheckpoint:
    """A loaded head, on the CPU. tensors: by the names of `head_shapes`."""

    path: str
    config: EagleConfig
    tensors: Mapping[str, Tensor]
    draft_vocab: None = None


def load_eagle(path: str | os.PathLike[str]) -> EagleCheckpoint:
    """Reads a head and checks every tensor.

    path: a folder, or an id on the Hugging Face hub. Raises OptionError: what is missing, corrupted
    or does not fit config.json; NotBuiltError for a layer that is not Llama's.
    """
    name, weights = os.fspath(path), (WEIGHTS, "pytorch_model.bin")
    folder = files.find_folder(name, weights)
    fields = files.read_config(folder / CONFIG, name)
    llama = LlamaConfig(**{"model_type": "llama"} | fields)
    rope = llama.rope_parameters
    found = {key: fields.get(key, getattr(llama, key)) for key in _FIXED}
    found["rope_type"] = rope["rope_type"]
    for key, value in found.items():
        if value != (allowed := _FIXED.get(key, "default")):
            reason = f"has {key} {value!r} in its {CONFIG}"
            raise not_built("heads", name, reason, f"give an EAGLE head with {key} {allowed!r}")
    about = {key: getattr(llama, key) for key in _SIZES} | {"rope_theta": rope["rope_theta"]}
    about = {"target": "unknown"} | fields.get(_ABOUT, {}) | about
    config = files.validated(EagleConfig, about, name)
    tensors = _merged(files.read_weights(folder, name, weights))
    shapes = head_shapes(config)
    if unequal := shapes.keys() - tensors.keys():
        raise corrupted(name, f"lack the tensor {min(unequal)!r}")
    if unequal := tensors.keys() - shapes.keys():
        raise corrupted(name, f"have a tensor {min(unequal)!r} that an EAGLE head has no place for")
    for part, shape in shapes.items():
        files.check_shape(name, part, tensors[part], shape)
    return EagleCheckpoint(name, config, tensors)


def save_eagle(
    path: str | os.PathLike[str], config: EagleConfig, tensors: Mapping[str, Tensor]
) -> None:
    """Writes a head in bfloat16, as vLLM loads it. tensors: by the names of `head_shapes`."""
    about = {key: getattr(config, key) for key in ("target", "embedding_sha256", "training")}
    llama = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        **{key: getattr(config, key) for key in _SIZES},
        **{key: value for key, value in _FIXED.items() if key != "model_type"},
        **{_ABOUT: about},
    )
    stored = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in _split(config, tensors).items()
    }
    files.write(Path(path), llama.to_json_string(use_diff=False).rstrip(), stored)


def _merged(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file by the names of `head_shapes`, as far as they have one."""
    tensors = {name.removeprefix("layers.0."): tensor for name, tensor in stored.items()}
    for whole, parts in _MERGED.items():
        names = [f"{whole.partition('.')[0]}.{part}_proj.weight" for part in parts]
        if all(name in tensors for name in names):
            rows = [tensors.pop(name) for name in names]
            if len({row.shape[1:] for row in rows}) == 1:
                tensors[f"{whole}.weight"] = torch.cat(rows)
    return tensors


def _split(config: EagleConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The opposite of `_merged`."""
    keys = config.num_key_value_heads * config.head_dim
    rows = {
        "self_attn.qkv_proj": (config.num_attention_heads * config.head_dim, keys, keys),
        "mlp.gate_up_proj": (config.intermediate_size,) * 2,
    }
    stored = {name if name == "fc.weight" else f"layers.0.{name}": t for name, t in tensors.items()}
    for whole, parts in _MERGED.items():
        matrix = stored.pop(f"layers.0.{whole}.weight").split(rows[whole])
        for part, piece in zip(parts, matrix, strict=True):
            stored[f"layers.0.{whole.partition('.')[0]}.{part}_proj.weight"] = piece
    return stored
