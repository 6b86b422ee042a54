"""The file format of trained MTP heads: a folder with config.json and model.safetensors.

Tensors, in float32, bfloat16 or float16 (k counts the stored modules; tied heads store only 0):

    mtp.{k}.{name}          as `module_shapes` lists them; the head is the target's own
    draft_vocab             integers [draft_vocab_size]: target ids, most frequent first, if reduced

A matrix may be int8, symmetric per row, with `{name}_scale`, float32 [rows], beside it.
Module k (from 0) takes, at position t, a hidden state of t and the embedding of token t+k+1 (times
`embed_scale`), attends to its own rows up to t with RoPE position t, and predicts token t+k+2.
Hidden states are those after the target's final norm; a module's own is its final norm's output.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt
from torch import Tensor

from vllm_specplus.proposers.heads import files, speculators
from vllm_specplus.proposers.heads.files import CONFIG, corrupted


class HeadsConfig(BaseModel):
    """What config.json says of the heads; `training` is free-form provenance."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_type: Literal["specplus_mtp"] = "specplus_mtp"
    architectures: tuple[str, ...] = ("SpecPlusMTP",)
    target: str = Field(description="name of the model that the heads were trained for")
    embedding_sha256: str | None = Field(
        default=None, description="`embedding_sha256` of that model, None if it was not kept"
    )
    vocab_size: PositiveInt | None = Field(
        default=None, description="tokens of the target, None if it was not kept"
    )
    num_modules: PositiveInt = Field(description="depths; past the last its module goes on")
    tied: bool = Field(description="one set of weights at all depths")
    hidden_state_from: Literal["previous", "target"] = Field(
        description="module k takes the hidden state of module k-1, or all take the target's"
    )
    hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    intermediate_size: PositiveInt
    hidden_act: str
    rope_theta: PositiveFloat
    rms_norm_eps: PositiveFloat
    norm_adds_one: bool = Field(default=False, description="gains are stored less 1, as in Gemma")
    sandwich_norms: bool = Field(
        default=False, description="attention and MLP are normed before and after, as in Gemma"
    )
    qk_norm: bool = Field(default=False, description="queries and keys are normed per head")
    attention_bias: bool = Field(default=False, description="qkv_proj has a bias, as in Qwen2")
    embed_scale: PositiveFloat = Field(default=1.0, description="factor on embedding rows")
    draft_vocab_size: PositiveInt | None = Field(
        default=None, description="rows of the reduced head, None for the whole vocabulary"
    )
    training: dict[str, Any] = Field(default_factory=dict)

    @property
    def num_stored(self) -> int:
        """Modules in the file."""
        return 1 if self.tied else self.num_modules


def module_shapes(config: HeadsConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one module's tensors.

    `qkv_proj` is queries, keys, values by rows and `gate_up_proj` gate, up; `eh_proj` takes
    [norm(embedding), norm(hidden)] in this order (DeepSeek-V3, 2024, arXiv 2412.19437). Without
    sandwich norms `post_attention_layernorm` comes before the MLP, with them after the attention.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    qkv = queries + 2 * config.num_key_value_heads * config.head_dim
    norms = ["enorm", "hnorm", "input_layernorm", "post_attention_layernorm", "final_norm"]
    if config.sandwich_norms:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    shapes: dict[str, tuple[int, ...]] = {f"{norm}.weight": (hidden,) for norm in norms}
    if config.qk_norm:
        shapes |= {f"self_attn.{norm}.weight": (config.head_dim,) for norm in ("q_norm", "k_norm")}
    if config.attention_bias:
        shapes["self_attn.qkv_proj.bias"] = (qkv,)
    return shapes | {
        "eh_proj.weight": (hidden, 2 * hidden),
        "self_attn.qkv_proj.weight": (qkv, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "mlp.gate_up_proj.weight": (2 * inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }


@dataclass(frozen=True, slots=True)
class HeadsCheckpoint:
    """Loaded heads, on the CPU. draft_vocab: int64 [draft_vocab_size], None for all tokens."""

    path: str
    config: HeadsConfig
    draft_vocab: Tensor | None
    tensors: Mapping[str, Tensor]

    def module(self, depth: int) -> dict[str, Tensor]:
        """The tensors of the module that drafts at `depth` (from 0), by the names of
        `module_shapes`; int8 matrices as float32, others as stored."""
        stored = min(depth, self.config.num_stored - 1)
        return {
            name: _dequantize(self.tensors, f"mtp.{stored}.{name}")
            for name in module_shapes(self.config)
        }


def load_heads(path: str | os.PathLike[str], revision: str | None = None) -> HeadsCheckpoint:
    """Reads heads, also in the format of the `speculators` library, and checks every tensor.

    path: a folder, or an id on the Hugging Face hub. revision: branch, tag or commit there. Raises
    OptionError: what is missing, corrupted or does not fit config.json.
    """
    name = os.fspath(path)
    folder = files.find_folder(name, revision=revision)
    fields = files.read_config(folder / CONFIG, name)
    tensors = files.read_weights(folder, name)
    if speculators.is_one(fields):
        fields, tensors = speculators.convert(fields, tensors)
    config = files.validated(HeadsConfig, fields, name)
    draft_vocab = tensors.pop("draft_vocab", None)
    checkpoint = HeadsCheckpoint(
        name, config, None if draft_vocab is None else draft_vocab.long(), tensors
    )
    _check(checkpoint)
    return checkpoint


def save_heads(
    path: str | os.PathLike[str],
    config: HeadsConfig,
    modules: Sequence[Mapping[str, Tensor]],
    draft_vocab: Tensor | None = None,
    *,
    int8: bool = False,
) -> None:
    """Writes heads; a reader finds the old files or the new ones, never half of one.

    modules: `config.num_stored` of them, by the names of `module_shapes`. int8: the
    matrices of the layer as int8.
    Raises OptionError for what `load_heads` would refuse.
    """
    tensors: dict[str, Tensor] = {}
    for number, module in enumerate(modules):
        for name, tensor in module.items():
            tensor = tensor.detach().cpu().contiguous()
            tensors |= _stored(f"mtp.{number}.{name}", tensor, int8 and _quantizes(name, tensor))
    _check(HeadsCheckpoint(str(path), config, draft_vocab, tensors))
    if draft_vocab is not None:
        tensors["draft_vocab"] = draft_vocab.to("cpu", torch.int32).contiguous()
    files.write(Path(path), config.model_dump_json(indent=2), tensors)


def _check(checkpoint: HeadsCheckpoint) -> None:
    """Raises OptionError unless the tensors are those of the config, finite and of its shapes."""
    config, tensors, name = checkpoint.config, checkpoint.tensors, checkpoint.path
    expected = {
        f"mtp.{number}.{part}": shape
        for number in range(config.num_stored)
        for part, shape in module_shapes(config).items()
    }
    scales = {
        f"{part}_scale"
        for part, shape in expected.items()
        if len(shape) == 2 and part in tensors and tensors[part].dtype == torch.int8
    }
    if unequal := expected.keys() - tensors.keys() | scales - tensors.keys():
        raise corrupted(name, f"lack the tensor {min(unequal)!r}")
    if unequal := tensors.keys() - expected.keys() - scales:
        raise corrupted(name, f"have a tensor {min(unequal)!r} that {CONFIG} does not speak of")
    for part, tensor in tensors.items():
        shape = expected[part] if part in expected else expected[part.removesuffix("_scale")][:1]
        files.check_shape(name, part, tensor, shape)
        if not tensor.is_floating_point() and f"{part}_scale" not in scales:
            raise corrupted(name, f"have {part!r} as {tensor.dtype}, where a float belongs")
    files.check_draft_vocab(name, checkpoint.draft_vocab, config.draft_vocab_size)


def _quantizes(name: str, tensor: Tensor) -> bool:
    """`eh_proj` stays: its columns span orders of magnitude where the target's final gains do, and
    one scale a row cost 3 % of the accepted drafts on Gemma-3-270M."""
    return tensor.dim() == 2 and name != "eh_proj.weight"


def _stored(name: str, tensor: Tensor, int8: bool) -> dict[str, Tensor]:
    """The tensor as it goes to the file: int8 with the scale of each row, or as it is."""
    if not int8:
        return {name: tensor}
    scale = tensor.float().abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return {name: (tensor.float() / scale[:, None]).round().to(torch.int8), f"{name}_scale": scale}


def _dequantize(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    tensor = tensors[name]
    if tensor.dtype == torch.int8:
        return tensor.float() * tensors[f"{name}_scale"][:, None]
    return tensor
