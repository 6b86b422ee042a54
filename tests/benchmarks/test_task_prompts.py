"""Prompts of everyday tasks: all templates are used and filled, none is Spec-Bench's.

Sabotage that was caught: a slot that no words fill, a kind without templates, a seed of the clock.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.task_prompts import TEMPLATES, main
from vllm_specplus.train.text import read_prompts

ROOT = Path(__file__).resolve().parents[2]


def test_prompts(tmp_path: Path) -> None:
    main(str(tmp_path / "a.jsonl"), "400")
    main(str(tmp_path / "b.jsonl"), "400")
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()
    prompts = read_prompts(tmp_path / "a.jsonl")
    assert len(prompts) > 350 and {prompt.kind for prompt in prompts} == set(TEMPLATES)
    assert not any(sign in prompt.text for prompt in prompts for sign in "{}")
    lines = (ROOT / "benchmarks/data/spec_bench_dev.jsonl").read_text().splitlines()
    theirs = {turn for line in lines for turn in json.loads(line)["turns"]}
    assert theirs.isdisjoint(prompt.text for prompt in prompts)
