"""Shapes that follow from other options, in all spellings; no engine is started here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.startup.spellings import by_flags, by_keywords, outcome
from vllm_specplus.errors import NotBuiltError, OptionError
from vllm_specplus.startup import derived, host, options
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


def test_lookahead_is_served_on_the_v2_runner(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wanted_engine", "tree_engine"):
        monkeypatch.setattr(options, name, lambda: host.V2_ENGINE)
    config, additional = outcome(by_keywords(model, **AHEAD))[:2]
    assert config["method"] == "ngram_gpu" and config["num_speculative_tokens"] == 26
    assert additional["specplus"]["speculative_model"] == "[lookahead]"
    with pytest.raises(NotBuiltError, match="speculative_verify='traversal' is not available"):
        by_keywords(model, **AHEAD | {"speculative_model": "[lookahead+ngram]"}, **DRAWN)


DRAWN = {"speculative_verify": "traversal"}
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


STATIC, NONE = "static:[(0,),(1,)]", (None, 0)
TREES = {1: NONE, 4: ("dynamic:9", 9), 16: (STATIC, 2), 64: NONE}


def tuned(
    path: Path, trees: Mapping[int, tuple[str | None, int]] = TREES, **fields: str
) -> dict[str, str]:
    """The options that name a file, which is of the model in its folder if not said otherwise."""
    recommended = {
        size: Recommended(speculative_tree=tree, num_nodes=nodes, num_accepted=0.5, speedup=1.2)
        for size, (tree, nodes) in trees.items()
    }
    about = {"engine": "cpu-v1", "model": "m", "speculative_model": "[ngram]"} | fields
    file = Tuned(
        **about,
        num_speculative_tokens=4,
        temperature=0.0,
        rates=[[0.4, 0.1]],
        accepted=[0.0, 0.4, 0.5],
        drafted=1.0,
        step_costs={1: 5.0, 8: 6.5},
        spec_ms={1: 0.1},
        recommended=recommended,
    )
    path.write_text(file.model_dump_json())
    return {"speculative_model": "[ngram]", "speculative_tree": f"tuned:{path}"}


def test_a_tuned_file_says_tree_depth_and_costs(model: str, tmp_path: Path) -> None:
    asked = tuned(tmp_path / "t.json")
    for spelled in (by_keywords, by_flags):
        config = spelled(model, **asked).additional_config["specplus"]
        assert config["tree"] == "dynamic:9"
        assert (config["num_speculative_tokens"], config["step_costs"]) == (4, "1:5.0,8:6.5")
    own = {"num_speculative_tokens": 2, "speculative_step_costs": "1:7"}
    config = by_keywords(model, **asked, **own).additional_config["specplus"]
    assert (config["num_speculative_tokens"], config["step_costs"]) == (2, "1:7.0")


def test_the_widest_tree_of_batches_that_can_be(model: str, tmp_path: Path) -> None:
    """It is made narrower in larger batches."""
    trees = {1: (STATIC, 2), 4: ("dynamic:9", 9), 16: ("dynamic:3", 3)}
    asked = tuned(tmp_path / "t.json", trees)
    for most, tree in ((3, STATIC), (4, "dynamic:9"), (64, "dynamic:9")):
        arguments = by_keywords(model, **asked, max_num_seqs=most)
        assert arguments.additional_config["specplus"]["tree"] == tree


def test_on_v2_each_batch_size_has_its_width(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("wanted_engine", "tree_engine"):
        monkeypatch.setattr(options, name, lambda: host.V2_ENGINE)
    monkeypatch.setattr(derived, "wanted_engine", lambda: host.V2_ENGINE)
    asked = tuned(tmp_path / "t.json", engine="v2") | {"max_num_seqs": 20}
    widths = [(1, 3, 0), (4, 15, 9), (16, 20, 2)]
    assert by_keywords(model, **asked).speculative_config[derived.WIDTHS] == widths
    own = {"speculative_step_costs": "1:7"}
    (every_size,) = by_keywords(model, **asked, **own).speculative_config[derived.WIDTHS]
    assert every_size == (1, 20, 9)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model": "other/model"}, "was measured with 'other/model', and this is"),
        ({"engine": "v2"}, "in the engine v2, and this is cpu-v1: its tree is used, its step"),
        ({"speculative_model": "[mtp3+ngram]a"}, "with 'a', and this is 'b'"),
    ],
)
def test_what_a_file_was_not_measured_for_is_said(
    model: str,
    tmp_path: Path,
    fields: dict[str, str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    warned: list[str] = []
    monkeypatch.setattr(derived.logger, "warning", lambda text, *args: warned.append(text % args))
    asked = tuned(tmp_path / "t.json", TREES, **{"model": model} | fields)
    if "speculative_model" in fields:
        asked["speculative_model"] = "[mtp3+ngram]b"
    config = by_keywords(model, **asked).additional_config["specplus"]
    assert [said in sentence for sentence in warned] == [True]
    assert (config["step_costs"] is None) == ("engine" in fields)


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
    file, asked = tmp_path / "t.json", tuned(tmp_path / "t.json")
    with pytest.raises(OptionError, match=r"no drafts of '\[ngram\]' pay"):
        by_keywords(model, **asked, max_num_seqs=1)
    tuned(file, {1: NONE, 64: NONE})
    with pytest.raises(OptionError, match=r"no drafts of '\[ngram\]' pay"):
        by_keywords(model, **asked)
    tuned(file, speculative_model="[mtp3]x")
    with pytest.raises(OptionError, match=r"was measured with '\[mtp3\]x', not with this method"):
        by_keywords(model, **asked)
    file.write_text("{}")
    with pytest.raises(OptionError, match="is no file that"):
        by_keywords(model, speculative_model="[ngram]", speculative_tree=f"tuned:{file}")
    with pytest.raises(OptionError, match="num_speculative_tokens=None must be given"):
        by_keywords(model, speculative_model="[ngram]", speculative_tree="optimal:5")
