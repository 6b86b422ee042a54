"""Files of heads: what the formats have in common."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from vllm_specplus.errors import OptionError, bad_option

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_WAY_OUT = "give the folder or hub id of heads, as `vllm-specplus train` writes them"
_HASHED_ROWS = 256
Config = TypeVar("Config", bound=BaseModel)


class TrainedFor(Protocol):
    """What the config of any heads says of their target; None where it does not."""

    @property
    def target(self) -> str: ...
    @property
    def embedding_sha256(self) -> str | None: ...
    @property
    def vocab_size(self) -> int | None: ...
    @property
    def hidden_size(self) -> int: ...


class Checkpoint(Protocol):
    """Heads of any format. draft_vocab: int64 [draft_vocab_size], None for all tokens."""

    @property
    def path(self) -> str: ...
    @property
    def config(self) -> TrainedFor: ...
    @property
    def draft_vocab(self) -> Tensor | None: ...


def find_folder(
    name: str, weights: tuple[str, ...] = (WEIGHTS,), revision: str | None = None
) -> Path:
    """The folder of that name, or what the hub has at `revision`. Raises OptionError."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        wanted = [CONFIG, *weights]
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        reason = f"is no folder, and the hub has no such heads ({type(error).__name__})"
        raise bad_option("heads", name, reason, _WAY_OUT) from None


def read_config(file: Path, name: str) -> dict[str, Any]:
    """The fields of a config.json. Raises OptionError."""
    try:
        fields = json.loads(file.read_text())
    except FileNotFoundError:
        raise bad_option("heads", name, f"has no {CONFIG}", _WAY_OUT) from None
    except ValueError as error:
        raise bad_option(
            "heads", name, f"has a {CONFIG} that is no JSON ({error})", _WAY_OUT
        ) from None
    if not isinstance(fields, dict):
        raise bad_option("heads", name, f"has a {CONFIG} that is no object", _WAY_OUT)
    return fields


def read_weights(
    folder: Path, name: str, weights: tuple[str, ...] = (WEIGHTS,)
) -> dict[str, Tensor]:
    """The tensors of the first of these files that is there. Raises OptionError."""
    there = [folder / file for file in weights if (folder / file).exists()]
    if not there:
        raise bad_option("heads", name, f"has no {' or '.join(weights)}", _WAY_OUT)
    try:
        if there[0].suffix == ".safetensors":
            return load_file(there[0])
        tensors = torch.load(there[0], map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = f"cannot be read ({str(error).splitlines()[0]})"
        raise bad_option("heads", name, reason, "fetch it again") from None
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise bad_option("heads", name, f"has no tensors by name in {there[0].name}", _WAY_OUT)
    return tensors


def validated(kind: type[Config], fields: Mapping[str, Any], name: str) -> Config:
    """The config of these fields. Raises OptionError."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise bad_option(
            "heads", name, f"has a {CONFIG} where {where!r} is wrong ({first['msg']})", _WAY_OUT
        ) from None


def check_shape(name: str, part: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raises OptionError unless the tensor has that shape and finite numbers."""
    if tuple(tensor.shape) != shape:
        found = tuple(tensor.shape)
        raise corrupted(name, f"have {part!r} of shape {found} where {CONFIG} asks for {shape}")
    if not torch.isfinite(tensor).all():
        raise corrupted(name, f"have NaN or infinity in {part!r}")


def check_draft_vocab(name: str, vocab: Tensor | None, size: int | None) -> None:
    """Raises OptionError unless these are as many different tokens as the config says."""
    found = None if vocab is None else len(vocab)
    if found != size:
        raise corrupted(name, f"have a draft_vocab of {found}, {CONFIG} says {size}")
    if vocab is not None and (int(vocab.min()) < 0 or len(vocab.unique()) < len(vocab)):
        raise corrupted(name, "have a draft_vocab with negative or repeated ids")


def corrupted(name: str, what: str) -> OptionError:
    """The error for files that do not fit each other."""
    return bad_option("heads", name, what, "the file is damaged or its config is; fetch it again")


def write(folder: Path, config: str, tensors: dict[str, Tensor]) -> None:
    """Writes heads; a reader finds the old files or the new ones, never half of one."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{WEIGHTS}.partial"
    partial.write_bytes(save(tensors, metadata={"format": "pt"}))
    partial.replace(folder / WEIGHTS)
    partial = folder / f".{CONFIG}.partial"
    partial.write_text(config + "\n")
    partial.replace(folder / CONFIG)


def check_fits(checkpoint: Checkpoint, hidden_size: int, vocab_size: int) -> None:
    """Raises OptionError, naming the sizes, where the heads cannot serve a target of these."""
    config, vocab = checkpoint.config, checkpoint.draft_vocab
    way_out = f"they were trained for {config.target}: serve that, or train heads for this model"
    if config.hidden_size != hidden_size:
        reason = f"have hidden_size {config.hidden_size}, but the model has {hidden_size}"
        raise bad_option("heads", checkpoint.path, reason, way_out)
    if config.vocab_size not in (None, vocab_size):
        reason = f"have vocab_size {config.vocab_size}, but the model has {vocab_size}"
        raise bad_option("heads", checkpoint.path, reason, way_out)
    if vocab is not None and int(vocab.max()) >= vocab_size:
        reason = f"draft token {int(vocab.max())}, but the model has {vocab_size} tokens"
        raise bad_option("heads", checkpoint.path, reason, way_out)


def embedding_sha256(embedding: Tensor) -> str:
    """SHA-256 of an embedding's first 256 rows in bfloat16: says which target heads are for.

    embedding: [vocab_size or more, hidden_size], of any floating dtype.
    """
    rows = embedding[:_HASHED_ROWS].detach().to("cpu", torch.bfloat16).contiguous()
    return hashlib.sha256(rows.view(torch.int16).numpy().tobytes()).hexdigest()
