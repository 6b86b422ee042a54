"""`vllm-specplus tune`: what it measures, recommends and writes, and what reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.engine.engines import model_path
from vllm_specplus.cli import main
from vllm_specplus.core.rank_counts import RankCounts
from vllm_specplus.startup.tune import BATCH_SIZES, TuneOptions, recommend


def options(**fields: Any) -> TuneOptions:
    return TuneOptions("m", "[ngram]", 3, 8, new_tokens=9, temperature=0.0, engine={}, **fields)


def counts(by_rank: list[list[int]], by_row: list[int]) -> RankCounts:
    return RankCounts(by_rank, by_row)


FLAT, STEEP = {1: 10.0, 64: 10.0, 128: 10.0}, {1: 10.0, 64: 640.0, 128: 1280.0}
SURE = counts([[90], [80], [70]], [100, 90, 80, 70])


def test_free_rows_get_the_whole_tree_and_dear_ones_none() -> None:
    free = recommend(options(), SURE, FLAT, spec_ms=0.0, drafted=1.0)
    dear = recommend(options(), SURE, STEEP, spec_ms=0.0, drafted=1.0)
    for batch_size in BATCH_SIZES:
        assert free.recommended[batch_size].speedup == pytest.approx(3.4)
        assert dear.recommended[batch_size].speculative_tree is None
        assert dear.recommended[batch_size].speedup == 1.0
    assert free.recommended[1].num_nodes == 3
    rare = recommend(options(), SURE, FLAT, spec_ms=0.0, drafted=0.25)
    assert rare.recommended[1].speedup == pytest.approx(1 + 0.25 * 2.4)
    slow = recommend(options(), SURE, FLAT, spec_ms=30.0, drafted=1.0)
    assert slow.recommended[1].speculative_tree is None


def test_the_better_kind_of_tree_is_recommended() -> None:
    """Dynamic trees put what is right first, or did not; the static one knows the ranks alone."""
    early = counts([[50, 40]], [100, 90, 0, 0])
    late = counts([[50, 40]], [100, 10, 10, 10, 20, 40])
    costs = {rows: 10.0 + rows for rows in (1, 64)}
    found = {
        name: recommend(options(), ranks, costs, 0.0, 1.0).recommended[1]
        for name, ranks in (("early", early), ("late", late))
    }
    assert found["early"].speculative_tree == "dynamic:1"
    assert found["late"].speculative_tree == "static:[(0,),(1,)]"
    assert found["late"].num_accepted == pytest.approx(0.9)


def tune(tmp_path: Path, *arguments: str) -> tuple[Any, Path]:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "tuned.json"
    lines = [{"prompt": "how long can the day be " * 4}, {"prompt": "red green red green " * 6}]
    prompts.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    fixed = ["--model", str(model_path("llama")), "--prompts", str(prompts), "--out", str(out)]
    size = ["--depth", "4", "--nodes", "12", "--eager", "--max-model-len", "256"]
    return CliRunner().invoke(main, ["tune", *fixed, *size, *arguments]), out


def test_a_model_is_tuned(tmp_path: Path) -> None:
    result, out = tune(tmp_path, "--method", "ngram")
    assert result.exit_code == 0, result.output
    assert f"tuned:{out}" in result.output.replace("\n", "")
    assert "[ngram], num_speculative_tokens=4" in " ".join(result.output.split())
    found = json.loads(out.read_text())
    assert set(found["recommended"]) == {str(size) for size in BATCH_SIZES}
    assert len(found["rates"]) == 4 and all(0 <= r <= 1 for rates in found["rates"] for r in rates)
    assert found["rates"][0][0] > 0.2  # the tiny model falls into loops
    curve = found["accepted"]
    assert len(curve) == 13 and curve == sorted(curve) and curve[0] == 0 < curve[1]
    assert [int(rows) for rows in found["step_costs"]] == [1, 2, 4, 8, 16, 32, 64, 104]


@pytest.mark.parametrize(
    ("method", "said"),
    [("lookahead", "weighs the rows of its window by itself"), ("ngrm", "did you mean 'ngram'")],
)
def test_what_cannot_be_tuned_ends_in_one_line(method: str, said: str, tmp_path: Path) -> None:
    result, out = tune(tmp_path, "--method", method)
    assert result.exit_code == 2 and not out.exists()
    assert said in result.output and "Traceback" not in result.output
