"""Shapes that follow from other options, in all spellings; no engine is started here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.startup.spellings import by_flags, by_keywords, outcome
from vllm_specplus.errors import NotBuiltError, OptionError
from vllm_specplus.startup import host, options
from vllm_specplus.startup.derived import Recommended, Tuned

pytestmark = pytest.mark.usefixtures("only_the_options_patched")
AHEAD = {"speculative_model": "[lookahead]", "lookahead_window": 4, "lookahead_prompt_tokens": 0}
AHEAD_KEYS = {"method": "lookahead", "lookahead_window": 4, "lookahead_prompt_tokens": 0}


def test_three_spellings_of_lookahead_mean_the_same(model: str) -> None:
    wanted = outcome(by_keywords(model, **AHEAD))
    assert wanted[0]["num_speculative_tokens"] == 26  # 4 * 3 - 1 of the window and 5 * 3 others
    assert wanted[1]["specplus"]["lookahead_prompt_tokens"] == 0
    assert outcome(by_flags(model, **AHEAD)) == wanted
    assert outcome(by_keywords(model, speculative_config=AHEAD_KEYS)) == wanted
    assert outcome(by_flags(model, speculative_config=AHEAD_KEYS)) == wanted


def test_lookahead_is_refused_on_the_v2_runner(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wanted_engine", "tree_engine"):
        monkeypatch.setattr(options, name, lambda: host.V2_ENGINE)
    with pytest.raises(NotBuiltError, match=r"='\[lookahead\]' .* not available in the engine v2;"):
        by_keywords(model, **AHEAD)


NGRAM = {"speculative_model": "[ngram]", "num_speculative_tokens": 3}


def test_optimal_stands_for_a_static_tree_in_every_spelling(model: str) -> None:
    asked = NGRAM | {"speculative_tree": "optimal:5"}
    wanted = outcome(by_keywords(model, **asked))
    assert wanted[1]["specplus"]["tree"] == "static:[(0,),(0,0),(1,),(2,),(3,)]"
    assert wanted[0]["num_speculative_tokens"] == 5
    assert outcome(by_flags(model, **asked)) == wanted
    keys = {"method": "ngram", "num_speculative_tokens": 3, "tree": "optimal:5"}
    assert outcome(by_keywords(model, speculative_config=keys)) == wanted
    assert outcome(by_keywords(model, **asked, speculative_config=keys)) == wanted


def tuned(path: Path, tree: str | None = "static:[(0,),(1,)]", method: str = "[ngram]") -> str:
    best = Recommended(speculative_tree=tree, num_nodes=2, num_accepted=0.5, speedup=1.2)
    file = Tuned(
        model="m",
        speculative_model=method,
        num_speculative_tokens=4,
        temperature=0.0,
        rates=[[0.4, 0.1]],
        accepted=[0.0, 0.4, 0.5],
        drafted=1.0,
        step_costs={1: 5.0, 8: 6.5},
        spec_ms=0.1,
        recommended={4: best.model_copy(update={"speculative_tree": None}), 1: best},
    )
    path.write_text(file.model_dump_json())
    return f"tuned:{path}"


def test_a_tuned_file_says_tree_depth_and_costs(model: str, tmp_path: Path) -> None:
    asked = {"speculative_model": "[ngram]", "speculative_tree": tuned(tmp_path / "t.json")}
    for spelled in (by_keywords, by_flags):
        config = spelled(model, **asked).additional_config["specplus"]
        assert config["tree"] == "static:[(0,),(1,)]"
        assert (config["num_speculative_tokens"], config["step_costs"]) == (4, "1:5.0,8:6.5")
    own = {"num_speculative_tokens": 2, "speculative_step_costs": "1:7"}
    config = by_keywords(model, **asked, **own).additional_config["specplus"]
    assert (config["num_speculative_tokens"], config["step_costs"]) == (2, "1:7.0")


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ("optimal:0", "is out of range"),
        ("optimal:128", "is out of range"),
        ("optimal:x", "write for example 'optimal:12'"),
        ("tuned:/not/there", "is no file that `vllm-specplus tune` has written"),
        ("tuned:", "is no file that"),
    ],
)
def test_derived_trees_that_cannot_be(model: str, tree: str, said: str) -> None:
    for spelled in (by_keywords, by_flags):
        with pytest.raises(OptionError, match=r"^speculative_tree=[^\n]*; [^\n]*\.$") as error:
            spelled(model, **NGRAM, speculative_tree=tree)
        assert said in str(error.value)


def test_files_that_say_something_else_are_refused(model: str, tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    for fields, said in (
        ({"tree": None}, "no drafts of '[ngram]' pay"),
        ({"method": "[mtp3]x"}, "was measured with '[mtp3]x', not with this method"),
    ):
        tree = tuned(file, **fields)
        with pytest.raises(OptionError) as error:
            by_keywords(model, speculative_model="[ngram]", speculative_tree=tree)
        assert said in str(error.value)
    file.write_text("{}")
    with pytest.raises(OptionError, match="is no file that"):
        by_keywords(model, speculative_model="[ngram]", speculative_tree=f"tuned:{file}")
    with pytest.raises(OptionError, match="num_speculative_tokens=None must be given"):
        by_keywords(model, speculative_model="[ngram]", speculative_tree="optimal:5")
