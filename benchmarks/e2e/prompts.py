"""Prompt files, the choice of prompts from them, and their grouping into batches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt as text; `category` is Spec-Bench's task name."""

    prompt_id: int
    category: str
    text: str


def load_prompts(path: Path, limit: int | None = None) -> list[Prompt]:
    """Read JSON lines in Spec-Bench's form (`question_id`, `category`, `turns`: the first counts).

    With `limit`, that many are taken at even distances, so that all categories keep their share.
    """
    prompts = [_parse_line(path, line) for line in path.read_text().splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"prompts {path}: the file has no line; give JSON lines with turns")
    if limit is None or limit >= len(prompts):
        return prompts
    if limit < 1:
        raise ValueError(f"limit={limit}: at least one prompt is needed")
    return [prompts[i * len(prompts) // limit] for i in range(limit)]


def first_of_each(prompts: Sequence[Prompt], categories: Sequence[str]) -> list[Prompt]:
    """The first prompt of each category, in the order of `categories`."""
    return [next(p for p in prompts if p.category == category) for category in categories]


def make_groups(num_prompts: int, batch_size: int, per_place: int = 1) -> list[tuple[int, ...]]:
    """Split prompt indices into groups of exactly `batch_size * per_place`; the last wraps."""
    size = batch_size * per_place
    if not 1 <= size <= num_prompts:
        times = f" with {per_place} prompts per place" if per_place != 1 else ""
        raise ValueError(
            f"batch size {batch_size}{times} must take from 1 to {num_prompts} prompts, their "
            "number; take other batch sizes or more prompts"
        )
    starts = range(0, num_prompts, size)
    return [tuple((start + i) % num_prompts for i in range(size)) for start in starts]


def _parse_line(path: Path, line: str) -> Prompt:
    try:
        row = json.loads(line)
        return Prompt(int(row["question_id"]), str(row["category"]), str(row["turns"][0]))
    except (json.JSONDecodeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"prompts {path}: {line[:60]!r} is not an object with question_id, category and turns"
        ) from error
