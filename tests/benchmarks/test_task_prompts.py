"""Prompts of everyday tasks: those that docs/training.md names, always the same, none
of them Spec-Bench's.

Sabotage that was caught: a seed of the clock, another number.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.task_prompts import TEMPLATES, main
from vllm_specplus.train.text import read_prompts

ROOT = Path(__file__).resolve().parents[2]


def test_prompts(tmp_path: Path) -> None:
    main(str(tmp_path / "a.jsonl"))
    main(str(tmp_path / "b.jsonl"))
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()
    prompts = read_prompts(tmp_path / "a.jsonl")
    assert len(prompts) == 2111 and {prompt.kind for prompt in prompts} == set(TEMPLATES)
    lines = (ROOT / "benchmarks/data/spec_bench_dev.jsonl").read_text().splitlines()
    theirs = {turn for line in lines for turn in json.loads(line)["turns"]}
    assert theirs.isdisjoint(prompt.text for prompt in prompts)
