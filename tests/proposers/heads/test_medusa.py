"""Medusa heads: both formats give the same heads, what is wrong is refused in one sentence, and the
heads are the paper's.

Sabotages that were caught: blocks without the residual, any one check left out, the rows of a
reduced vocabulary not looked up, heads in each other's place.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vllm_specplus.errors import OptionError
from vllm_specplus.proposers.heads.files import check_fits
from vllm_specplus.proposers.heads.medusa import MedusaHeads
from vllm_specplus.proposers.heads.medusa_checkpoint import (
    MedusaConfig,
    check_depth,
    load_medusa,
    save_medusa,
)

NUM_HEADS, NUM_LAYERS, HIDDEN, VOCAB = 3, 2, 8, 20
DRAFTED = torch.tensor([4, 0, 19, 7, 11])
TOLERANCE = 1e-5  # float32, products of 8 terms


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blocks(bias: bool = True) -> dict[str, Tensor]:
    """By vLLM's names."""
    tensors: dict[str, Tensor] = {}
    for head in range(NUM_HEADS):
        for layer in range(NUM_LAYERS):
            name, seed = f"blocks.{head}.layers.{layer}", 10 * head + layer
            tensors[f"{name}.weight"] = random(HIDDEN, HIDDEN, seed=seed)
            if bias:
                tensors[f"{name}.bias"] = random(HIDDEN, seed=seed + 5)
    return tensors


def lm_heads(rows: int = VOCAB) -> dict[str, Tensor]:
    return {
        f"lm_heads.{head}.weight": random(rows, HIDDEN, seed=100 + head)
        for head in range(NUM_HEADS)
    }


def write(folder: Path, file: str, tensors: dict[str, Tensor], **fields: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if file.endswith(".pt"):
        torch.save(tensors, folder / file)
    else:
        save_file(tensors, folder / file)
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def authors(folder: Path, prefix: str = "", file: str = "medusa_lm_head.pt", **own: Tensor) -> Path:
    """The format of the paper's repository."""
    tensors = {}
    for name, tensor in (blocks() | own).items():
        kind, head, *rest = name.split(".")
        last = f"{rest[1]}.linear.{rest[2]}" if kind == "blocks" else f"{NUM_LAYERS}.weight"
        tensors[f"{prefix}{head}.{last}"] = tensor
    about: dict[str, Any] = dict(medusa_num_heads=NUM_HEADS, medusa_num_layers=NUM_LAYERS)
    about |= dict(base_model_name_or_path="lmsys/vicuna-7b-v1.3", num_hidden_layers=32)
    return write(folder, file, tensors, **about)


def vllms(folder: Path, tensors: dict[str, Tensor], **fields: Any) -> Path:
    """The format that vLLM's own Medusa reads."""
    about = dict(architectures=["MedusaModel"], model_type="medusa", num_heads=NUM_HEADS)
    about |= dict(num_hidden_layers=NUM_LAYERS, hidden_size=HIDDEN, vocab_size=VOCAB)
    return write(folder, "model.safetensors", tensors, **about | fields)


def tops(folder: Path, num: int = 4) -> tuple[Tensor, Tensor]:
    """What the heads draft after three rows, beside a target whose head is random."""
    loaded = load_medusa(folder)
    heads = MedusaHeads.from_checkpoint(loaded)
    vocab = torch.arange(VOCAB) if loaded.draft_vocab is None else loaded.draft_vocab
    heads.shared = lambda hidden: hidden @ random(VOCAB, HIDDEN, seed=7)[vocab].T
    return heads.best(random(3, HIDDEN, seed=1), NUM_HEADS, num)


def by_hand(own: dict[str, Tensor], num: int = 4) -> tuple[Tensor, Tensor]:
    """The same over the whole vocabulary, from the paper's formula."""
    tensors, found = blocks(), []
    for head in range(NUM_HEADS):
        x = random(3, HIDDEN, seed=1)
        for layer in range(NUM_LAYERS):
            name = f"blocks.{head}.layers.{layer}"
            y = x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]
            x = x + y * torch.sigmoid(y)
        weight = own.get(f"lm_heads.{head}.weight", random(VOCAB, HIDDEN, seed=7))
        found.append((x @ weight.T).log_softmax(1).topk(num))
    return torch.stack([f.indices for f in found], 1), torch.stack([f.values for f in found], 1)


def assert_same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("file", ["medusa_lm_head.pt", "medusa_lm_head.safetensors"])
@pytest.mark.parametrize("prefix", ["", "medusa_head."])
@pytest.mark.parametrize("own", [{}, lm_heads()], ids=["target's head", "own heads"])
def test_the_authors_format(tmp_path: Path, own: dict[str, Tensor], prefix: str, file: str) -> None:
    folder = authors(tmp_path, prefix, file, **own)
    assert_same(tops(folder), by_hand(own))
    about = load_medusa(folder).config
    assert (about.num_heads, about.num_layers, about.hidden_size) == (NUM_HEADS, NUM_LAYERS, HIDDEN)
    assert about.target == "lmsys/vicuna-7b-v1.3"
    assert about.vocab_size == (VOCAB if own else None)


def test_vllms_format(tmp_path: Path) -> None:
    assert_same(tops(vllms(tmp_path / "own", blocks() | lm_heads())), by_hand(lm_heads()))
    one = lm_heads()["lm_heads.0.weight"]
    shared = {f"lm_heads.{head}.weight": one for head in range(NUM_HEADS)}
    for name in ("lm_head.weight", "lm_heads.0.weight"):
        folder = vllms(tmp_path / name, blocks() | {name: one}, original_lm_head=True)
        assert_same(tops(folder), by_hand(shared))
    scaled = vllms(tmp_path / "scaled", blocks() | lm_heads(), logit_scale=0.5)
    halves = {name: 0.5 * weight for name, weight in lm_heads().items()}
    assert_same(tops(scaled), by_hand(halves))


@pytest.mark.parametrize("own", [{}, lm_heads(), lm_heads(len(DRAFTED))], ids=["none", "all", "5"])
def test_a_reduced_vocabulary(tmp_path: Path, own: dict[str, Tensor]) -> None:
    fields = dict(truncated_vocab_size=len(DRAFTED))
    folder = vllms(tmp_path, blocks() | own | {"token_map": DRAFTED}, **fields)
    rows = {
        name: weight[DRAFTED] if len(weight) == VOCAB else weight for name, weight in own.items()
    }
    if not own:
        weight = random(VOCAB, HIDDEN, seed=7)[DRAFTED]
        rows = {f"lm_heads.{head}.weight": weight for head in range(NUM_HEADS)}
    tokens, logprobs = by_hand(rows)
    assert_same(tops(folder), (DRAFTED[tokens], logprobs))


def saved(folder: Path, **fields: Any) -> Path:
    sizes = dict(num_heads=NUM_HEADS, num_layers=NUM_LAYERS, hidden_size=HIDDEN, has_bias=True)
    about = dict(vocab_size=VOCAB, draft_vocab_size=len(DRAFTED), shares_head=True, target="a/b")
    config = MedusaConfig.model_validate(sizes | about | fields, by_name=True)
    save_medusa(folder, config, blocks(), DRAFTED)
    assert load_medusa(folder).config == config
    return folder


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    loaded = load_medusa(saved(tmp_path, training={"minutes": 3}))
    assert loaded.draft_vocab is not None and torch.equal(loaded.draft_vocab, DRAFTED)
    assert loaded.tensors.keys() == blocks().keys()
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in blocks().items())


def test_fit(tmp_path: Path) -> None:
    loaded = load_medusa(saved(tmp_path))
    check_fits(loaded, HIDDEN, VOCAB)
    with pytest.raises(OptionError, match="have hidden_size 8, but the model has 16"):
        check_fits(loaded, 16, VOCAB)
    with pytest.raises(OptionError, match=r"have vocab_size 20, but .* trained for a/b"):
        check_fits(loaded, HIDDEN, 32)
    check_depth(loaded, 3)
    with pytest.raises(OptionError, match=r"num_speculative_tokens=4 is more than the 3 heads of "):
        check_depth(loaded, 4)


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(fields | changes))

    return edit


def edit_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


BLOCK = "blocks.1.layers.0.weight"
DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    (lambda folder: (folder / "model.safetensors").unlink(), "or medusa_lm_head.pt"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"12"), "cannot be read"),
    (lambda folder: (folder / "config.json").write_text("{}"), "is wrong (Field required)"),
    (edit_config(num_heads=0), "where 'num_heads' is wrong"),
    (edit_config(num_heads=4), "lack the tensor 'blocks.3.layers.0.bias'"),
    (edit_config(num_heads=2), "have a tensor 'blocks.2."),
    (edit_config(num_hidden_layers=1), "have a tensor 'blocks.0.layers.1.bias'"),
    (edit_config(hidden_size=9), "config.json asks for (9,)"),
    (edit_config(truncated_vocab_size=6), "have a draft_vocab of 5, config.json says 6"),
    (edit_config(truncated_vocab_size=None), "have a draft_vocab of 5, config.json says None"),
    (edit_tensors(lambda t: t.pop(BLOCK)), f"lack the tensor '{BLOCK}'"),
    (edit_tensors(lambda t: t.pop("token_map")), "have a draft_vocab of None"),
    (edit_tensors(lambda t: t[BLOCK][3].fill_(torch.inf)), f"NaN or infinity in '{BLOCK}'"),
    (edit_tensors(lambda t: t.update({BLOCK: t[BLOCK].int()})), "where a float belongs"),
    (edit_tensors(lambda t: t.update(lm_heads(6))), "'lm_heads.0.weight' of shape (6, 8)"),
    (edit_tensors(lambda t: t["token_map"].fill_(3)), "negative or repeated ids"),
    (edit_tensors(lambda t: t.update(x=torch.ones(1))), "have a tensor 'x'"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGES, ids=[said for _, said in DAMAGES])
def test_damage_is_refused(tmp_path: Path, damage: Callable[[Path], object], said: str) -> None:
    folder = saved(tmp_path)
    damage(folder)
    with pytest.raises(OptionError) as refused:
        load_medusa(folder)
    message = str(refused.value)
    assert said in message and message.startswith("heads=") and "\n" not in message


def test_own_heads_are_all_there(tmp_path: Path) -> None:
    own = lm_heads()
    own.pop("lm_heads.1.weight")
    with pytest.raises(OptionError, match=r"lack the tensor 'lm_heads\.1\.weight'"):
        load_medusa(vllms(tmp_path / "a", blocks() | own))
    folder = authors(tmp_path / "b")
    torch.save([1], folder / "medusa_lm_head.pt")
    with pytest.raises(OptionError, match=r"has no tensors by name in medusa_lm_head\.pt"):
        load_medusa(folder)
    (folder / "medusa_lm_head.pt").write_bytes(b"PK\x03\x04 not a file of torch's")
    with pytest.raises(OptionError, match="cannot be read"):
        load_medusa(folder)
