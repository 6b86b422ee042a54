"""Options as the user writes them: what is read, what is refused and how it is said."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_specplus.config import METHODS, MethodSpec, SpecPlusConfig, parse_methods
from vllm_specplus.errors import NotBuiltError, OptionError
from vllm_specplus.medusa_trees import MEDUSA_TREES
from vllm_specplus.shapes import MAX_NODES, Chain, DynamicTree, StaticTree, parse_tree

NGRAM = {"speculative_model": "[ngram]", "num_speculative_tokens": 5}


@st.composite
def static_trees(draw: st.DrawFn) -> list[tuple[int, ...]]:
    """Paths of a random tree, in random order."""
    paths: list[tuple[int, ...]] = [()]
    for _ in range(draw(st.integers(1, 40))):
        parent = draw(st.sampled_from(paths))
        rank = sum(path[:-1] == parent for path in paths if path)
        paths.append((*parent, rank))
    return draw(st.permutations(paths[1:]))


@given(static_trees())
def test_static_tree_keeps_its_nodes_in_prefix_order(paths: list[tuple[int, ...]]) -> None:
    """Seen to fail with the sort key `sum(path)`, which puts deep nodes before their parents."""
    tree = StaticTree(tuple(paths))
    assert set(tree.paths) == set(paths) and len(tree.paths) == len(paths)
    assert tree.depth == max(map(len, paths))
    for end, path in enumerate(tree.paths):
        before = tree.paths[:end]
        assert path[:-1] == () or path[:-1] in before
        assert path[-1] == 0 or (*path[:-1], path[-1] - 1) in before


@given(static_trees() | st.integers(1, MAX_NODES) | st.none())
def test_text_form_round_trips(shape: list[tuple[int, ...]] | int | None) -> None:
    if isinstance(shape, list):
        tree: Any = StaticTree(tuple(shape))
        shuffled = random.Random(0).sample(shape, len(shape))
        assert parse_tree(f"static:{shuffled}") == tree
    else:
        tree = Chain() if shape is None else DynamicTree(shape)
    assert parse_tree(str(tree)) == tree


def test_example_of_the_issue_is_its_own_text_form() -> None:
    assert str(parse_tree("static:[(1,), (0, 0), (0,)]")) == "static:[(0,),(0,0),(1,)]"


def test_published_trees_have_their_nodes() -> None:
    """As published: 63 nodes each; the first one's levels have 10, 28, 23 and 2."""
    for name in MEDUSA_TREES:
        tree = parse_tree(f"medusa:{name}")
        assert isinstance(tree, StaticTree) and len(tree.paths) == 63 and tree.depth in (3, 4)
        assert parse_tree(str(tree)) == tree
    counts = Counter(len(path) for path in MEDUSA_TREES["mc_sim_7b_63"])
    assert counts == {1: 10, 2: 28, 3: 23, 4: 2}
    assert {(0, 7, 0), (1, 6), (0, 0, 0, 1), (9, 0)} <= set(MEDUSA_TREES["mc_sim_7b_63"])
    options = {"speculative_model": "[medusa]m", "tree": "medusa:vicuna_7b_stage2"}
    config = SpecPlusConfig.from_options(options)
    assert (config.num_speculative_tokens, config.num_nodes) == (4, 63)


@pytest.mark.parametrize(
    ("text", "methods"),
    [
        ("[ngram]", [("ngram", None)]),
        (" [ eagle ] /some/where ", [("eagle", "/some/where")]),
        ("[mtp]", [("mtp", None)]),
        ("[ngram+mtp3]heads", [("ngram", None), ("mtp3", "heads")]),
        ("[mtp+draft]org/m", [("mtp", None), ("draft", "org/m")]),
        ("facebook/opt-125m", [("draft", "facebook/opt-125m")]),
    ],
)
def test_speculative_model_is_read(text: str, methods: list[tuple[str, str | None]]) -> None:
    assert parse_methods(text) == tuple(MethodSpec(*method) for method in methods)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        *[(text, "cannot be read") for text in ("", " ", "[]", "[ngram", "ngram]", "[[ngram]]")],
        ("[ngrm]", "did you mean 'ngram'"),
        ("[+ngram]", "has no method ''"),
        ("ngram", "write '[ngram]'"),
        ("[ngram+ngram]", "names a method twice"),
        ("[ngram]path", "none of its methods"),
        ("[eagle]", "write '[eagle]MODEL'"),
        ("[eagle+draft]path", "eagle and draft"),
    ],
)
def test_unreadable_speculative_model(text: str, said: str) -> None:
    with pytest.raises(OptionError, match=r"^speculative_model='.*; .*\.$") as error:
        SpecPlusConfig.from_options({**NGRAM, "speculative_model": text})
    assert said in str(error.value)


@pytest.mark.parametrize("text", ["[draft]A+[eagle]B", "[draft]A+[draft]B+[draft]C"])
def test_only_two_draft_models_have_a_model_each(text: str) -> None:
    with pytest.raises(NotBuiltError, match="only two draft models may have"):
        SpecPlusConfig.from_options({**NGRAM, "speculative_model": text})
    config = SpecPlusConfig.from_options({**NGRAM, "speculative_model": "[draft]A + [draft]B"})
    assert config.method == "draft+draft"
    assert [spec.model for spec in config.methods] == ["A", "B"]


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        *[(t, "cannot be read") for t in ("", "dynamic", "dynamic:", "dynamic:x", "chain:3", 12)],
        *[(f"static:{t}", "cannot be read") for t in ("", "[0]", "[(-1,)]", "[(0,)", "(" * 9999)],
        *[(f"dynamic:{n}", "1 to 127 nodes") for n in (0, -1, 128)],
        ("static:[]", "0 nodes"),
        (f"static:{[(rank,) for rank in range(128)]}", "128 nodes"),
        ("static:[(0,),(1,0)]", "(1, 0) without its parent (1,)"),
        ("static:[(1,)]", "(1,) without its sibling of the rank before, (0,)"),
        ("static:[(0,),(0,0),(0,0,0),(0,0,0,0),(0,0,0,0,0),(0,0,0,0,0,0)]", "give at least 6"),
    ],
)
def test_bad_tree(tree: Any, said: str) -> None:
    with pytest.raises(OptionError, match=r"^(speculative_tree|num_speculative_tokens)=") as error:
        SpecPlusConfig.from_options({**NGRAM, "tree": tree})
    assert said in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_speculative_tokens": 0}, "num_speculative_tokens=0 is refused"),
        ({"num_speculative_tokens": -3}, "num_speculative_tokens=-3 is refused"),
        ({"num_speculative_tokens": 128}, "less than or equal to 127"),
        ({"num_speculative_tokens": True}, "num_speculative_tokens=True is refused"),
        ({"num_speculative_tokens": None}, "num_speculative_tokens=None must be given"),
        ({"verify": "typcal"}, "speculative_verify='typcal' is refused"),
        ({"ngram_prompt_lookup_max": 0}, "ngram_prompt_lookup_max=0 is refused"),
        ({"ngram_prompt_lookup_min": 6, "ngram_prompt_lookup_max": 5}, "lookup_max=5"),
        ({"speculative_model": "[mtp]", "ngram_prompt_lookup_max": 3}, "belongs to [ngram]"),
        ({"speculative_model": None}, "speculative_model=None is refused"),
        ({"beam": 3}, "beam=3 is no option"),
        ({"lookahead_window": 3}, "belongs to [lookahead]"),
        ({"lookahead_prompt_tokens": 3}, "belongs to [lookahead]"),
        ({"step_costs": "1:5.1"}, "belongs to a tree"),
    ],
)
def test_bad_value(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=r"^[^\n]*; [^\n]*\.$") as error:
        SpecPlusConfig.from_options(NGRAM | options)
    assert said in str(error.value)


AHEAD = {"speculative_model": "[lookahead]"}


@pytest.mark.parametrize(
    ("options", "depth", "num_nodes"),
    [
        ({}, 6, 29),
        ({"lookahead_window": 15, "lookahead_ngram": 5, "lookahead_candidates": 15}, 17, 119),
        ({"lookahead_window": 32, "lookahead_candidates": 32}, 33, MAX_NODES),
        ({"lookahead_window": 1, "lookahead_ngram": 2, "lookahead_candidates": 1}, 1, 1),
        ({"tree": "dynamic:14"}, 6, 14),
        ({"num_speculative_tokens": 9, "lookahead_ngram": 3}, 9, 19),
    ],
)
def test_a_lookahead_window_is_a_shape(options: dict[str, Any], depth: int, num_nodes: int) -> None:
    config = SpecPlusConfig.from_options(AHEAD | options)
    assert (config.num_speculative_tokens, config.num_nodes) == (depth, num_nodes)
    sent = json.loads(json.dumps(config.model_dump(mode="json")))
    assert SpecPlusConfig.model_validate(sent) == config


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tree": "dynamic:13"}, "no room for the 14 nodes of the lookahead window"),
        ({"tree": "chain"}, "write for example 'dynamic:29'"),
        ({"tree": "static:[(0,)]"}, "no room for the 14 nodes"),
        ({"num_speculative_tokens": 5}, "less than the depth 6 of the lookahead window"),
        (
            {"lookahead_window": 32, "lookahead_ngram": 8},
            "no room for the 223 nodes of the lookahead window; make lookahead_window or",
        ),
        ({"lookahead_window": 0}, "lookahead_window=0 is refused"),
        ({"lookahead_window": "5"}, "lookahead_window='5' is refused"),
        ({"lookahead_ngram": 1}, "lookahead_ngram=1 is refused"),
        ({"lookahead_candidates": 33}, "lookahead_candidates=33 is refused"),
        ({"lookahead_prompt_tokens": -1}, "lookahead_prompt_tokens=-1 is refused"),
    ],
)
def test_a_lookahead_window_that_does_not_fit(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=r"^[^\n]*; [^\n]*\.$") as error:
        SpecPlusConfig.from_options(AHEAD | options)
    assert said in str(error.value)


COSTS = {1: 5.1, 8: 5.2, 64: 7.9}


@pytest.mark.parametrize(
    "spelled",
    [
        COSTS,
        {str(rows): ms for rows, ms in COSTS.items()},
        "1:5.1,8:5.2,64:7.9",
        " 1: 5.1, 8:5.2, 64:7.9",
    ],
)
def test_step_costs_are_read_and_travel_as_json(spelled: Any) -> None:
    config = SpecPlusConfig.from_options(NGRAM | {"tree": "dynamic:9", "step_costs": spelled})
    assert config.step_costs == COSTS
    sent = json.loads(json.dumps(config.model_dump(mode="json")))
    assert sent["step_costs"] == "1:5.1,8:5.2,64:7.9"
    assert SpecPlusConfig.model_validate(sent) == config


@pytest.mark.parametrize(
    "costs",
    [
        *["", "x", "5.1", "1:5.1,", "1:5.1;8:5.2", "1:5.1:2", "1.5:5", "1:x", {}, [], [5.1], 5],
        *["0:5.1", "-1:5.1", "8:5.1,1:5.2", "1:5.1,1:5.2", {8: 5.1, 1: 5.2}],
        *["1:0", "1:-1", "1:nan", "1:inf", {1: None}, {None: 1}, {1.5: 5}],
    ],
)
def test_bad_step_costs(costs: Any) -> None:
    """Each part of the check was seen to be needed: rising rows, first row, sign, nan, inf."""
    with pytest.raises(OptionError, match=r"^speculative_step_costs=[^\n]*; [^\n]*\.$") as error:
        SpecPlusConfig.from_options(NGRAM | {"tree": "dynamic:9", "step_costs": costs})
    assert "write for example '1:5.1,8:5.2,64:7.9'" in str(error.value)


@pytest.mark.parametrize(
    ("options", "depth", "num_nodes"),
    [
        (NGRAM, 5, 5),
        (NGRAM | {"tree": "dynamic:12"}, 5, 12),
        (NGRAM | {"tree": "static:[(0,),(0,0),(1,)]"}, 5, 3),
        ({"speculative_model": "[ngram]", "tree": "static:[(0,),(0,0),(1,)]"}, 2, 3),
        ({"speculative_model": "[suffix]"}, 24, 24),
    ],
)
def test_depth_and_nodes(options: dict[str, Any], depth: int, num_nodes: int) -> None:
    config = SpecPlusConfig.from_options(options)
    assert (config.num_speculative_tokens, config.num_nodes) == (depth, num_nodes)


@pytest.mark.parametrize(
    ("given_range", "used"), [({}, (1, 5)), ({"max": 4}, (1, 4)), ({"min": 7}, (7, 7))]
)
def test_ngram_range_defaults(given_range: dict[str, int], used: tuple[int, int]) -> None:
    options = {f"ngram_prompt_lookup_{end}": value for end, value in given_range.items()}
    config = SpecPlusConfig.from_options(NGRAM | options)
    assert (config.ngram_prompt_lookup_min, config.ngram_prompt_lookup_max) == used


@pytest.mark.parametrize("name", [name for name in METHODS if name != "lookahead"])
@pytest.mark.parametrize("tree", ["chain", "dynamic:9", "static:[(0,),(1,)]"])
def test_config_travels_as_json(name: str, tree: str) -> None:
    model = "" if METHODS[name].model == "none" else "/some/model"
    options = {"speculative_model": f"[{name}]{model}", "num_speculative_tokens": 3, "tree": tree}
    config = SpecPlusConfig.from_options(options)
    sent = json.loads(json.dumps(config.model_dump(mode="json")))
    assert sent["tree"] == tree
    assert SpecPlusConfig.model_validate(sent) == config
