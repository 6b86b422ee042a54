"""Prompts, and the text that a target wrote after them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from vllm_specplus.errors import bad_option

PIECE_CHARS = 1000
"""Plain files are cut into prompts of this many characters; the tokens that count are fewer."""
MIX = (0.0, 0.3, 0.6, 0.8, 0.8, 1.0)
"""Temperatures of the training text, one after the other."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """source: prompts of one source are held out together; kind: what the report is split by."""

    text: str
    kind: str
    source: str


def read_prompts(path: Path) -> list[Prompt]:
    """All prompts of a file or of the files in a folder, in a fixed order; raises OptionError.

    `.jsonl` holds an object per line with "prompt", "text" or "turns" (the first counts) and
    perhaps "category" or "kind". Any other file is plain text, of its suffix's kind.
    """
    if not path.exists():
        raise bad_option("prompts", str(path), "does not exist", "give a file or a folder")
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    prompts = [prompt for file in files for prompt in _read(file)]
    if len({prompt.source for prompt in prompts}) < 2:
        raise bad_option(
            "prompts",
            str(path),
            "must hold two sources at least, one to train on and one to hold out",
            "give more lines of a .jsonl file, or more files",
        )
    return prompts


def _read(file: Path) -> list[Prompt]:
    content = file.read_text(encoding="utf-8", errors="replace")
    if file.suffix == ".jsonl":
        return [_read_line(file, line) for line in content.splitlines() if line.strip()]
    pieces = [content[i : i + PIECE_CHARS] for i in range(0, len(content), PIECE_CHARS)]
    kind = file.suffix.removeprefix(".") or "text"
    return [Prompt(piece, kind, str(file)) for piece in pieces if piece.strip()]


def _read_line(file: Path, line: str) -> Prompt:
    try:
        row = json.loads(line)
        text = row.get("prompt") or row.get("text") or row["turns"][0]
        return Prompt(str(text), str(row.get("category") or row.get("kind") or "text"), str(text))
    except (ValueError, AttributeError, KeyError, IndexError, TypeError):
        reason = f"has the line {line[:40]!r}, which is no object with 'prompt', 'text' or 'turns'"
        raise bad_option("prompts", str(file), reason, "mend it") from None


def split(prompts: Sequence[Prompt], share: float) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts, by the hash of their source: the same in every run."""
    digests = {p.source: hashlib.sha256(p.source.encode()).digest() for p in prompts}
    ordered = sorted(digests, key=lambda source: digests[source])
    held_out = set(ordered[: min(max(1, round(share * len(ordered))), len(ordered) - 1)])
    return (
        [prompt for prompt in prompts if prompt.source not in held_out],
        [prompt for prompt in prompts if prompt.source in held_out],
    )


class Sample(BaseModel):
    """One prompt and what the target wrote after it; held-out text is greedy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    token_ids: list[int]
    prompt_len: int
    kind: str
    held_out: bool


class TextFile:
    """Samples as JSON lines, the first of which says who wrote them. It grows by whole samples."""

    def __init__(self, file: Path, model: str) -> None:
        self.file, self.samples = file, list[Sample]()
        header = json.dumps({"model": model})
        if not file.exists():
            file.write_text(header + "\n")
        first, *lines = file.read_text().splitlines(keepends=True)
        if first.strip() != header:
            raise bad_option(
                "out", str(file), f"begins with {first.strip()}, not {header}", _WAY_OUT
            )
        if lines and not lines[-1].endswith("\n"):  # an interrupted write
            file.write_text("".join([first, *lines[:-1]]))
            lines.pop()
        try:
            self.samples += map(Sample.model_validate_json, lines)
        except ValidationError:
            raise bad_option("out", str(file), "holds a damaged line", _WAY_OUT) from None

    def add(self, samples: Sequence[Sample]) -> None:
        with self.file.open("a") as out:
            out.writelines(sample.model_dump_json() + "\n" for sample in samples)
        self.samples += samples


_WAY_OUT = "remove it or take another folder"


@dataclass(frozen=True, slots=True)
class Text:
    """All samples, one after the other.

    tokens: int32 [num_tokens]; offsets: int64 [num_samples + 1]; prompt_lens: int64 [num_samples];
    held_out: bool [num_samples]; kinds: of each sample.
    """

    tokens: Tensor
    offsets: Tensor
    prompt_lens: Tensor
    held_out: Tensor
    kinds: tuple[str, ...]

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Text:
        lengths = torch.tensor([0, *(len(sample.token_ids) for sample in samples)])
        return cls(
            torch.tensor([t for s in samples for t in s.token_ids], dtype=torch.int32),
            lengths.cumsum(0),
            torch.tensor([sample.prompt_len for sample in samples]),
            torch.tensor([sample.held_out for sample in samples]),
            tuple(sample.kind for sample in samples),
        )

    def __getitem__(self, index: int) -> Tensor:
        """The tokens of one sample, int32 [length]."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def digest(self) -> str:
        """Names this text: what was computed from another one does not belong to it."""
        content = self.tokens.numpy().tobytes() + self.offsets.numpy().tobytes()
        return hashlib.sha256(content).hexdigest()[:12]
