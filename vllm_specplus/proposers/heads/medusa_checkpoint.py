"""The file formats of Medusa heads (Cai et al. 2024, arXiv 2401.10774), and what they say.

Head k (from 0) takes the hidden state of position t that the target's own head takes, and predicts
token t+k+2: residual blocks x + SiLU(W x + b), then a matrix over the vocabulary. Two formats:

    the authors'    {k}.{layer}.linear.weight, .bias    blocks.{k}.layers.{layer}.weight, .bias
    and vLLM's      {k}.{num_layers}.weight             lm_heads.{k}.weight, or lm_head.weight
                                                        token_map, int [draft_vocab_size]

The first is in medusa_lm_head.pt or .safetensors, with or without a `medusa_head.` before it; vLLM
up to 0.32 reads both. Either may leave out the matrices over the vocabulary: then the target's own
head is used, over the tokens of `token_map` if there is one. `vllm-specplus train medusa` writes
the second.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt
from torch import Tensor

from vllm_specplus.errors import bad_option
from vllm_specplus.proposers.heads import files
from vllm_specplus.proposers.heads.files import CONFIG, WEIGHTS, corrupted

_FILES = (WEIGHTS, "medusa_lm_head.safetensors", "medusa_lm_head.pt")


class MedusaConfig(BaseModel):
    """What config.json says of the heads, by vLLM's names or the authors'; it may say more."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    model_type: str = "medusa"
    architectures: tuple[str, ...] = ("MedusaModel",)
    target: str = Field(
        default="an unnamed model",
        validation_alias=AliasChoices("target", "base_model_name_or_path"),
    )
    embedding_sha256: str | None = None
    num_heads: PositiveInt = Field(validation_alias=AliasChoices("medusa_num_heads", "num_heads"))
    num_layers: PositiveInt = Field(
        validation_alias=AliasChoices("medusa_num_layers", "num_hidden_layers"),
        serialization_alias="num_hidden_layers",
    )
    hidden_size: PositiveInt
    vocab_size: PositiveInt | None = None
    draft_vocab_size: PositiveInt | None = Field(
        default=None,
        validation_alias=AliasChoices("truncated_vocab_size"),
        serialization_alias="truncated_vocab_size",
    )
    has_bias: bool = Field(validation_alias="medusa_fc_bias", serialization_alias="medusa_fc_bias")
    shares_head: bool = Field(
        default=False,
        validation_alias="original_lm_head",
        serialization_alias="original_lm_head",
        description="one matrix over the vocabulary for all heads, the target's or the file's",
    )
    logit_scale: PositiveFloat = 1.0
    training: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MedusaCheckpoint:
    """Loaded heads, on the CPU. draft_vocab: int64 [draft_vocab_size], None for all tokens.

    tensors: by vLLM's names, but for a matrix that all heads share, which is `lm_heads.0.weight`.
    """

    path: str
    config: MedusaConfig
    draft_vocab: Tensor | None
    tensors: Mapping[str, Tensor]

    @property
    def num_lm_heads(self) -> int:
        """Matrices over the vocabulary in the file: 0, 1 for all, or one for each head."""
        return sum(name.startswith("lm_heads.") for name in self.tensors)


def load_medusa(path: str | os.PathLike[str]) -> MedusaCheckpoint:
    """Reads heads of either format and checks every tensor.

    path: a folder, or an id on the Hugging Face hub. Raises OptionError: what is missing, corrupted
    or does not fit config.json.
    """
    name = os.fspath(path)
    folder = files.find_folder(name, _FILES)
    fields = files.read_config(folder / CONFIG, name)
    stored = files.read_weights(folder, name, _FILES)
    tensors = {_renamed(key): tensor for key, tensor in stored.items()}
    own = {key: tensors.pop(key) for key in sorted(tensors) if key.startswith("lm_head")}
    if "lm_head.weight" in own or fields.get("original_lm_head"):
        own = dict(zip(["lm_heads.0.weight"], own.values(), strict=False))
        fields["original_lm_head"] = True
    tensors |= own
    draft_vocab = tensors.pop("token_map", None)
    fields["medusa_fc_bias"] = "blocks.0.layers.0.bias" in tensors
    if (first := tensors.get("blocks.0.layers.0.weight")) is not None:
        fields.setdefault("hidden_size", first.shape[-1])
    if draft_vocab is None and own:
        fields.setdefault("vocab_size", len(next(iter(own.values()))))
    if draft_vocab is None and fields.get("truncated_vocab_size") == fields.get("vocab_size"):
        fields.pop("truncated_vocab_size", None)
    config = files.validated(MedusaConfig, fields, name)
    if draft_vocab is not None:
        draft_vocab = draft_vocab.long()
        tensors = {key: _rows_of(key, tensor, draft_vocab) for key, tensor in tensors.items()}
    checkpoint = MedusaCheckpoint(name, config, draft_vocab, tensors)
    _check(checkpoint)
    return checkpoint


def save_medusa(
    path: str | os.PathLike[str],
    config: MedusaConfig,
    tensors: Mapping[str, Tensor],
    draft_vocab: Tensor | None = None,
) -> None:
    """Writes heads in vLLM's format. Raises OptionError for what `load_medusa` would refuse."""
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _check(MedusaCheckpoint(str(path), config, draft_vocab, kept))
    if draft_vocab is not None:
        kept["token_map"] = draft_vocab.to("cpu", torch.int64).contiguous()
    files.write(Path(path), config.model_dump_json(indent=2, by_alias=True), kept)


def check_depth(checkpoint: MedusaCheckpoint, depth: int) -> None:
    """Raises OptionError where fewer heads are there than are to draft."""
    num_heads = checkpoint.config.num_heads
    if depth > num_heads:
        raise bad_option(
            "num_speculative_tokens",
            depth,
            f"is more than the {num_heads} heads of {checkpoint.path}",
            f"give {num_heads} at most, and a tree that is no deeper",
        )


def _renamed(name: str) -> str:
    """The name in vLLM's format."""
    name = re.sub(r"^medusa_heads?\.", "", name)
    name = re.sub(r"^(\d+)\.(\d+)\.linear\.", r"blocks.\1.layers.\2.", name)
    return re.sub(r"^(\d+)\.\d+\.weight$", r"lm_heads.\1.weight", name)


def _rows_of(name: str, tensor: Tensor, draft_vocab: Tensor) -> Tensor:
    """The draft vocabulary's rows of a matrix over all tokens; other tensors as they are."""
    whole = name.startswith("lm_heads.") and len(tensor) > len(draft_vocab)
    return tensor[draft_vocab] if whole and int(draft_vocab.max()) < len(tensor) else tensor


def _expected(checkpoint: MedusaCheckpoint) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors that the config speaks of; -1 for any number of rows."""
    config, size = checkpoint.config, checkpoint.config.hidden_size
    for head in range(config.num_heads):
        for layer in range(config.num_layers):
            yield f"blocks.{head}.layers.{layer}.weight", (size, size)
            if config.has_bias:
                yield f"blocks.{head}.layers.{layer}.bias", (size,)
    rows = config.draft_vocab_size or config.vocab_size or -1
    num_lm_heads = checkpoint.num_lm_heads and (1 if config.shares_head else config.num_heads)
    yield from ((f"lm_heads.{head}.weight", (rows, size)) for head in range(num_lm_heads))


def _check(checkpoint: MedusaCheckpoint) -> None:
    """Raises OptionError unless the tensors are those of the config, finite and of its shapes."""
    config, tensors, name = checkpoint.config, checkpoint.tensors, checkpoint.path
    expected = dict(_expected(checkpoint))
    if unequal := expected.keys() - tensors.keys():
        raise corrupted(name, f"lack the tensor {min(unequal)!r}")
    if unequal := tensors.keys() - expected.keys():
        raise corrupted(name, f"have a tensor {min(unequal)!r} that {CONFIG} does not speak of")
    for part, tensor in tensors.items():
        shape = tuple(
            found if size < 0 else size
            for size, found in zip(expected[part], tensor.shape, strict=False)
        )
        files.check_shape(name, part, tensor, shape)
        if not tensor.is_floating_point():
            raise corrupted(name, f"have {part!r} as {tensor.dtype}, where a float belongs")
    files.check_draft_vocab(name, checkpoint.draft_vocab, config.draft_vocab_size)
