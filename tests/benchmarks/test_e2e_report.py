"""The end-to-end benchmark after it has measured: statistics, equality, tables, JSON, plot."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.e2e.benchmark import Options, Result
from benchmarks.e2e.engine import Counters, Generated
from benchmarks.e2e.equality import (
    END,
    NEAR_TIE_ULPS,
    Divergence,
    compare,
    explain,
    find_divergences,
    unit_in_last_place,
)
from benchmarks.e2e.measure import Plan, Round, Run
from benchmarks.e2e.methods import parse_methods
from benchmarks.e2e.plots import plot_rows
from benchmarks.e2e.prompts import Prompt
from benchmarks.e2e.report import print_result, to_json
from benchmarks.e2e.summary import Spread, spread, summarize

OURS = "[ngram]:tree=dynamic:12"
NO_DRAFTS = (0, 0, 0, ())
BF16_ULP = 0.125  # from 16 to 32


def make_run(
    method: str,
    index: int,
    seconds: float,
    texts: tuple[tuple[int, ...], ...],
    steps: int,
    drafts: tuple[int, int, int, tuple[int, ...]] = NO_DRAFTS,
) -> Run:
    """A run of one group; a step of the engine decodes for every request, the first one fills. Ours
    drafts for a hundredth of the time."""
    group = tuple(range(index, index + len(texts)))
    draft_seconds = seconds / 100 if method == OURS else None
    counters = Counters(steps + 1, steps * len(texts), *drafts, draft_seconds)
    return Run(method, Round(len(texts), 0, index, group), Generated(seconds, texts, counters))


RUNS = [
    make_run("plain", 0, 4.0, ((1, 2, 3, 4),), steps=3),
    make_run(OURS, 0, 1.0, ((1, 2, 3, 4),), 1, (3, 3, 2, (1, 1, 0))),
    make_run(OURS, 1, 2.0, ((5, 6, 9, 9),), 2, (1, 3, 1, (1, 0, 0))),
    make_run("plain", 1, 6.0, ((5, 6, 7, 8),), steps=3),
]
PLAN = Plan([[10, 11], [12]], batch_sizes=(1,), max_tokens=4, temperature=0.0)


def top_logits(prompt_ids: Sequence[int], count: int) -> list[tuple[int, float]]:
    """Two bf16 steps between tokens 7 and 9 after the one prefix at which the texts part."""
    assert prompt_ids == [12, 5, 6]
    return [(7, 20.0), (9, 20.0 - 2 * BF16_ULP), (8, 10.0)][:count]


def make_result() -> Result:
    prompts = [Prompt(81, "writing", "a"), Prompt(91, "qa", "b")]
    options = Options(Path("models/tiny"), prompts, parse_methods([OURS]), max_tokens=4)
    equalities = compare(RUNS, PLAN, "bfloat16", top_logits)
    return Result(options, "bfloat16", RUNS, summarize(RUNS), equalities, {"plain": 1.0})


def test_spread_is_the_percentiles() -> None:
    assert spread([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == Spread(2.0, 3.5, 5.0)


def test_rows_pair_rounds_with_plain() -> None:
    plain, ours = summarize(RUNS)
    assert (plain.method, plain.speedup, plain.acceptance_length) == ("plain", Spread(1, 1, 1), 1)
    assert ours.tokens_per_second.p50 == pytest.approx((4.0 + 2.0) / 2)
    assert ours.speedup.p50 == pytest.approx((4.0 + 3.0) / 2)
    assert ours.total_speedup == pytest.approx((8 / 3) / (8 / 10))
    assert ours.step_ms == pytest.approx(1000 * 3 / 5)
    assert ours.acceptance_length == pytest.approx((8 - 2) / 3)
    assert ours.acceptance_per_depth == (0.5, 0.25)
    assert (ours.drafts, ours.drafted, ours.accepted) == (4, 6, 3)
    assert (ours.nodes, plain.nodes, plain.draft_ms) == (6 / 3, 0, None)
    assert ours.draft_ms == pytest.approx(ours.step_ms / 100)


def test_counters_count_from_a_point_in_time() -> None:
    before, after = Counters(1, 2, 3, 4, 5, (), 6.0), Counters(11, 22, 33, 44, 55, (3, 2), 66.0)
    assert after.since(before) == Counters(10, 20, 30, 40, 50, (3, 2), 60.0)
    assert after.since(after) == Counters(0, 0, 0, 0, 0, (0, 0), 0.0)
    untimed = Counters(0, 0, 0, 0, 0, (), None)
    assert untimed.since(untimed) == untimed


def test_divergences_are_the_first_differences() -> None:
    plain = {0: (1, 2, 3), 1: (1, 2, 3), 2: (1, 2, 3)}
    texts = {0: (1, 2, 3), 1: (1, 5, 6), 2: (1, 2)}
    assert find_divergences(texts, plain) == [Divergence(1, 1, 2, 5), Divergence(2, 2, 3, END)]


def test_units_in_the_last_place() -> None:
    assert unit_in_last_place(22.5, "bfloat16") == unit_in_last_place(-16.0, "bfloat16") == BF16_ULP
    assert unit_in_last_place(15.9, "bfloat16") == BF16_ULP / 2
    assert unit_in_last_place(1.0, "float32") == 2.0**-23


@pytest.mark.parametrize(
    ("ulps", "near_tie"), [(0, True), (NEAR_TIE_ULPS, True), (NEAR_TIE_ULPS + 1, False)]
)
def test_only_a_small_gap_is_a_near_tie(ulps: int, near_tie: bool) -> None:
    logits = [(7, 20.0), (9, 20.0 - ulps * BF16_ULP)]
    for tokens in ((7, 9), (9, 7)):
        found = explain(Divergence(0, 3, *tokens), logits, "bfloat16")
        assert (found.logit_gap, found.gap_in_ulps) == (ulps * BF16_ULP, ulps)
        assert found.near_tie == near_tie


def test_a_token_that_is_no_candidate_is_not_explained() -> None:
    found = explain(Divergence(0, 3, 7, 1), [(7, 20.0), (9, 20.0)], "bfloat16")
    assert found.logit_gap is None and not found.near_tie


def test_greedy_texts_are_compared_and_explained() -> None:
    (equality,) = compare(RUNS, PLAN, "bfloat16", top_logits)
    assert (equality.method, equality.num_equal, equality.compared) == (OURS, 1, 2)
    assert equality.num_unexplained == 0
    (divergence,) = equality.divergences
    assert (divergence.prompt_index, divergence.token_index) == (1, 2)
    assert divergence.gap_in_ulps == 2


def test_a_gap_too_large_is_reported_as_an_error() -> None:
    (equality,) = compare(RUNS, PLAN, "float32", top_logits)
    assert equality.num_unexplained == 1


def test_sampled_texts_are_only_compared() -> None:
    plan = Plan(PLAN.prompt_ids, (1,), max_tokens=4, temperature=0.8)
    (equality,) = compare(RUNS, plan, "bfloat16", lambda prompt_ids, count: pytest.fail("asked"))
    assert (equality.num_equal, equality.num_unexplained) == (1, 0)


def test_plain_is_compared_across_batch_sizes() -> None:
    wide = Run(
        "plain",
        Round(2, 0, 0, (0, 1)),
        Generated(1.0, ((1, 2, 3, 4), (5, 6, 9, 9)), RUNS[0].generated.counters),
    )
    plan = Plan(PLAN.prompt_ids, (1, 2), max_tokens=4, temperature=0.0)
    found = compare([*RUNS, wide], plan, "bfloat16", top_logits)[-1]
    assert (found.method, found.batch_size, found.plain_batch_size) == ("plain", 2, 1)
    assert [d.prompt_index for d in found.divergences] == [1]


def test_the_tables_name_all_that_was_measured() -> None:
    output = io.StringIO()
    print_result(make_result(), Console(width=100, file=output))
    text = output.getvalue()
    lines = [line.split() for line in text.splitlines()]
    assert [line for line in lines if line[:1] == [OURS]] == [
        [OURS, "1", "2.4", "3.0", "3.6", "3.20", "3.50", "3.80"],
        [OURS, "1", "2.00", "0.50", "0.25", "2.00", "600.0", "6.0"],
        f"{OURS} at batch 1: 1 of 2 texts equal those of plain, 1 leave at a near-tie".split(),
    ]
    assert "prompt 91: token 2 is 9 instead of 7, logit gap 0.2500" in text


def test_the_json_has_every_row_and_round() -> None:
    data = json.loads(json.dumps(to_json(make_result())))
    assert {"schema", "versions", "commit", "cpu", "cores", "settings"} <= data.keys()
    assert data["versions"].keys() >= {"python", "torch"}
    assert data["settings"]["prompt_ids"] == [81, 91]
    assert [row["method"] for row in data["rows"]] == ["plain", OURS]
    assert data["rows"][1]["speedup"]["p50"] == 3.5
    assert [(r["method"], r["prompts"], r["seconds"]) for r in data["rounds"]] == [
        *(("plain", [81], 4.0), (OURS, [81], 1.0), (OURS, [91], 2.0), ("plain", [91], 6.0))
    ]
    (equality,) = data["equality"]
    assert (equality["num_equal"], equality["divergences"][0]["prompt"]) == (1, 91)
    assert equality["divergences"][0]["logit_gap"] == 0.25


def test_the_plot_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the demo extra is not installed")
    path = tmp_path / "results/plot.png"
    plot_rows(summarize(RUNS), "title", path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 10_000
