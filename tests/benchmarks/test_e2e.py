"""The end-to-end benchmark before it measures: methods, prompts, the order of the rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.e2e.benchmark import Options
from benchmarks.e2e.demo import CATEGORIES
from benchmarks.e2e.generate import PROMPTS
from benchmarks.e2e.measure import Plan, make_rounds, rotated
from benchmarks.e2e.methods import parse_method, parse_methods
from benchmarks.e2e.prompts import Prompt, first_of_each, load_prompts, make_groups

OURS = "[ngram]:tree=dynamic:12"


@pytest.mark.parametrize(
    ("text", "kwargs"),
    [
        ("plain", {}),
        (
            "native-ngram:K=3:max=4",
            {
                "speculative_config": {
                    "method": "ngram",
                    "num_speculative_tokens": 3,
                    "prompt_lookup_max": 4,
                    "prompt_lookup_min": 2,
                }
            },
        ),
        (
            "native-ngram-gpu:min=1",
            {
                "speculative_config": {
                    "method": "ngram_gpu",
                    "num_speculative_tokens": 5,
                    "prompt_lookup_max": 5,
                    "prompt_lookup_min": 1,
                }
            },
        ),
        ("[ngram]", {"speculative_model": "[ngram]", "num_speculative_tokens": 5}),
        (
            "[lookahead]:W=8:N=3:G=2",
            {
                "speculative_model": "[lookahead]",
                "lookahead_window": 8,
                "lookahead_ngram": 3,
                "lookahead_candidates": 2,
            },
        ),
        (
            "[eagle]/models/a:b:K=4:tree=static:[(0,),(0,0)]:verify=match:max=3:min=2",
            {
                "speculative_model": "[eagle]/models/a:b",
                "num_speculative_tokens": 4,
                "speculative_tree": "static:[(0,),(0,0)]",
                "speculative_verify": "match",
                "ngram_prompt_lookup_max": 3,
                "ngram_prompt_lookup_min": 2,
            },
        ),
    ],
)
def test_a_method_is_parsed_into_engine_arguments(text: str, kwargs: dict[str, object]) -> None:
    method = parse_method(text)
    assert (method.label, method.engine_kwargs) == (text, kwargs)
    assert method.uses_plugin == ("speculative_model" in kwargs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "name is empty"),
        ("plain:K=2", "plain takes no options"),
        ("[ngram]:K=many", "K='many' must be a whole number"),
        ("native-ngram:tree=chain", "native-ngram takes K, max and min"),
    ],
)
def test_a_malformed_method_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_method(text)


def test_plain_always_runs_and_first() -> None:
    assert [m.label for m in parse_methods([OURS, "plain"])] == ["plain", OURS]
    with pytest.raises(ValueError, match="named twice"):
        parse_methods([OURS, OURS])


def test_a_limit_keeps_the_shares_of_the_categories() -> None:
    everything = load_prompts(PROMPTS)
    chosen = load_prompts(PROMPTS, 24)
    assert (len(everything), len(chosen)) == (240, 24)
    for category in ("translation", "summarization", "qa", "math_reasoning", "rag"):
        assert sum(p.category == category for p in everything) == 40
        assert sum(p.category == category for p in chosen) == 4
    assert [p.category for p in first_of_each(everything, CATEGORIES)] == list(CATEGORIES)


def test_a_prompt_file_of_another_form_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    for content, message in (("", "no line"), ('{"prompt": "a"}\n', "question_id")):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            load_prompts(path)


def test_groups_are_full_and_cover_all_prompts() -> None:
    assert make_groups(5, 2) == [(0, 1), (2, 3), (4, 0)]
    assert make_groups(6, 2, per_place=2) == [(0, 1, 2, 3), (4, 5, 0, 1)]
    with pytest.raises(ValueError, match="batch size 2 with 3 prompts per place must take"):
        make_groups(5, 2, per_place=3)
    for batch_size in (0, 6):
        with pytest.raises(ValueError, match=f"batch size {batch_size}"):
            make_groups(5, batch_size)


def test_every_method_is_first_in_turn() -> None:
    assert [rotated("abc", i) for i in range(4)] == [list(s) for s in ("abc", "bca", "cab", "abc")]
    plan = Plan([[1], [2], [3]], batch_sizes=(1, 2), max_tokens=4, temperature=0.0, repeats=2)
    rounds = make_rounds(plan)
    assert [(r.batch_size, r.repeat, r.index) for r in rounds[:4]] == [
        *((1, 0, 0), (1, 0, 1), (1, 0, 2)),
        (1, 1, 0),
    ]
    assert len(rounds) == 2 * (3 + 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 64}, "max_tokens=64 must be from 1 to"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"batch_sizes": (1, 3)}, "batch size 3 must take from 1 to 2"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    options: dict[str, Any] = {"max_tokens": 8, "max_model_len": 64} | changes
    with pytest.raises(ValueError, match=message):
        Options(Path("model"), [Prompt(1, "qa", "a")] * 2, parse_methods([]), **options)
