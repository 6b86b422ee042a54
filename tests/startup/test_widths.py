"""How many nodes at which batch size: what options say of it, and what is measured."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from vllm.v1.executor.abstract import Executor

from tests.startup.spellings import TREE, TREE_KEYS, by_flags, by_keywords, outcome
from vllm_specplus.core.width import describe
from vllm_specplus.errors import OptionError
from vllm_specplus.startup import host, options, patches

pytestmark = pytest.mark.usefixtures("only_the_options_patched")
OTHER_EXECUTOR = "vllm.v1.executor.uniproc_executor.ExecutorWithExternalLauncher"
WIDTHS = "num_speculative_tokens_per_batch_size"


@pytest.fixture
def v2_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options lead to the V2 engine, which needs no Triton to be named."""
    monkeypatch.setattr(options, "tree_engine", lambda: host.V2_CPU_ENGINE)


COSTS = {1: 5.0, 16: 5.0, 17: 50.0}
"""Rows are free up to 16."""
ALL_FREE_ROWS = [(1, 1, 12), (2, 2, 6), (3, 4, 3), (5, 8, 1), (9, 20, 0)]


@pytest.mark.usefixtures("v2_engine")
def test_step_costs_become_a_schedule_of_vllm(model: str) -> None:
    as_text = ",".join(f"{rows}:{ms}" for rows, ms in COSTS.items())
    flags = TREE | {"max_num_seqs": 20}
    wanted = outcome(by_keywords(model, **flags, speculative_step_costs=COSTS))
    assert wanted[0][WIDTHS] == ALL_FREE_ROWS
    assert wanted[1]["specplus"]["step_costs"] == as_text
    assert outcome(by_flags(model, **flags, speculative_step_costs=as_text)) == wanted
    keys = TREE_KEYS | {"step_costs": as_text}
    for spelled in (by_keywords, by_flags):
        assert outcome(spelled(model, speculative_config=keys, max_num_seqs=20)) == wanted
    again = by_keywords(model, **flags, speculative_step_costs=COSTS, speculative_config=keys)
    assert outcome(again) == wanted
    for_default = by_keywords(model, **TREE, speculative_step_costs=COSTS).speculative_config
    assert for_default[WIDTHS] == [*ALL_FREE_ROWS[:-1], (9, 1024, 0)]


@pytest.mark.usefixtures("v2_engine")
def test_a_schedule_of_the_user_is_taken_as_it_is(model: str) -> None:
    keys = TREE_KEYS | {WIDTHS: [[1, 3, 12], [4, 8, 2]]}
    for spelled in (by_keywords, by_flags):
        given = spelled(model, speculative_config=keys).speculative_config
        assert given[WIDTHS] == keys[WIDTHS] and given["num_speculative_tokens"] == 12
    with pytest.raises(OptionError, match=f"^{WIDTHS}=.*says what step_costs says; give one of"):
        by_keywords(model, speculative_config=keys, speculative_step_costs="1:5")


@pytest.fixture
def on_a_gpu(v2_engine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs are measured; otherwise this is a CPU, on which vLLM wants no V2 runner."""
    monkeypatch.setattr(patches, "wanted_engine", lambda: host.V2_ENGINE)


def test_costs_are_measured_where_none_are_given(model: str, on_a_gpu: None) -> None:
    """For that, graphs of all widths are captured, and the executor is ours."""
    config = by_keywords(model, **TREE, max_num_seqs=20).create_engine_config()
    given = config.speculative_config.num_speculative_tokens_per_batch_size
    assert given == [(1, 1, 12), (2, 2, 6), (3, 3, 3), (4, 4, 1), (5, 20, 0)]
    assert Executor.get_class(config).__name__ == "MeasuringUniProcExecutor"
    assert len(pickle.dumps(Executor.get_class(config))) < 200


@pytest.mark.parametrize(
    "given", [{"speculative_step_costs": COSTS}, {"speculative_config": {WIDTHS: [(1, 9, 5)]}}]
)
def test_costs_are_not_measured_where_widths_are_given(
    model: str, on_a_gpu: None, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(patches.logger, "info", lambda text, *args: said.append(text % args))
    config = by_keywords(model, **TREE, max_num_seqs=20, **given).create_engine_config()
    assert Executor.get_class(config).__name__ == "UniProcExecutor"
    widths = config.speculative_config.num_speculative_tokens_per_batch_size
    assert said == [f"speculative_tree: {describe(widths)}"]


def test_no_widths_where_costs_cannot_be_measured(model: str, on_a_gpu: None) -> None:
    """Every batch is drafted whole trees then, not those of the schedule that was captured."""
    other = by_keywords(model, **TREE, distributed_executor_backend=OTHER_EXECUTOR)
    config = other.create_engine_config()
    assert config.speculative_config.num_speculative_tokens_per_batch_size is None
    assert Executor.get_class(config).__name__ == "ExecutorWithExternalLauncher"


def test_other_engines_have_vllms_executor(model: str) -> None:
    for options_given in ({}, TREE):
        config = by_keywords(model, **options_given).create_engine_config()
        assert Executor.get_class(config).__name__ == "UniProcExecutor"
        speculative = config.speculative_config
        assert getattr(speculative, WIDTHS, None) is None
