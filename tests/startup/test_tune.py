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
from vllm_specplus.startup.derived import Recommended
from vllm_specplus.startup.tune import BATCH_SIZES, Measured, TuneOptions, recommend

OPTIONS = TuneOptions("m", "[ngram]", 3, 8, new_tokens=9, temperature=0.0, engine={})
FLAT, STEEP = {1: 10.0, 64: 10.0, 128: 10.0}, {1: 10.0, 64: 640.0, 128: 1280.0}
SURE = RankCounts([[90], [80], [70]], [100, 90, 80, 70])


def best(
    ranks: RankCounts,
    step_costs: dict[int, float],
    spec_ms: tuple[float, float] = (0.0, 0.0),
    drafted: float = 1.0,
) -> dict[int, Recommended]:
    return recommend(OPTIONS, Measured(ranks, drafted, step_costs, spec_ms), "cpu-v1").recommended


def test_free_rows_get_the_whole_tree_and_dear_ones_none() -> None:
    free, dear = best(SURE, FLAT), best(SURE, STEEP)
    for batch_size in BATCH_SIZES:
        assert free[batch_size].speedup == pytest.approx(3.4)
        assert dear[batch_size].speculative_tree is None
        assert dear[batch_size].speedup == 1.0
    assert free[1].num_nodes == 3
    assert best(SURE, FLAT, drafted=0.25)[1].speedup == pytest.approx(1 + 0.25 * 2.4)


def test_drafting_takes_its_time_per_step_or_per_request() -> None:
    """Whether it found something or not."""
    assert best(SURE, FLAT, (30.0, 0.0))[1].speculative_tree is None
    batched, one_by_one = best(SURE, FLAT, (10.0, 0.1)), best(SURE, FLAT, (0.5, 0.5))
    assert batched[1].speedup == batched[64].speedup == pytest.approx(3.4 / 2)
    assert one_by_one[1].speedup == pytest.approx(3.4 / 1.05)
    assert one_by_one[64].speculative_tree is None
    rare = best(SURE, FLAT, (5.0, 0.0), drafted=0.25)[1]
    assert rare.speedup == pytest.approx((1 + 0.25 * 2.4) / 1.5)


def test_the_better_kind_of_tree_is_recommended() -> None:
    """Dynamic trees put what is right first, or did not; the static one knows the ranks alone."""
    costs = {rows: 10.0 + rows for rows in (1, 64)}
    early = best(RankCounts([[50, 40]], [100, 90, 0, 0]), costs)[1]
    late = best(RankCounts([[50, 40]], [100, 10, 10, 10, 20, 40]), costs)[1]
    assert early.speculative_tree == "dynamic:1"
    assert late.speculative_tree == "static:[(0,),(1,)]"
    assert late.num_accepted == pytest.approx(0.9)


def tune(tmp_path: Path, *arguments: str) -> tuple[Any, Path]:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "tuned.json"
    lines = [{"prompt": "how long can the day be " * 4}, {"prompt": "red green red green " * 99}]
    # The second is longer than the model: it is cut.
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
    assert 0 < found["spec_ms"]["1"] <= found["spec_ms"]["64"] and found["engine"] == "cpu-v1"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--method lookahead", "weighs the rows of its window by itself"),
        ("--method ngrm", "did you mean 'ngram'"),
        ("--method ngram --model /no/model", "model='/no/model' cannot be read by vLLM"),
        ("--method ngram --max-model-len 999999", "max_model_len (999999) is greater"),
        ("--method ngram --new-tokens 256", "nodes=12 leave no room for prompts in"),
    ],
)
def test_what_cannot_be_tuned_ends_in_one_line(arguments: str, said: str, tmp_path: Path) -> None:
    result, out = tune(tmp_path, *arguments.split())
    assert result.exit_code == 2 and not out.exists()
    assert said in result.output and "Traceback" not in result.output
