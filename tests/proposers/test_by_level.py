"""Two sources in one tree; what the modules draft is tested in tests/engine/test_mtp.py.

Sabotages that were caught: duplicates kept apart, one cell for all sources, outcomes that are not
learned, n-grams asked after a token that they have not proposed, a frontier beyond the slots,
levels that count nodes without rows, or those of n-grams; modules that begin anew without those
behind, or never while they are closed.
"""

from __future__ import annotations

from math import log

import numpy as np
import pytest
import torch

from tests.proposers.conformance import Decoding, make, mixing
from tests.proposers.levels_model import FunctionModel
from vllm_specplus.core.cost import CostModel
from vllm_specplus.proposers.base import DraftRequest
from vllm_specplus.proposers.by_level import MAX_CAUGHT_UP, _Draft, _Request
from vllm_specplus.proposers.levels import HiddenStates
from vllm_specplus.proposers.merged import by_levels
from vllm_specplus.proposers.sources import SourceCells

MATCHES = {(): {5: 0.4, 9: 0.3}, (5,): {6: 0.5}, (9,): {}, (5, 6): {}}


def ngrams(path):
    """Stands where Votes does; like these, it knows nothing of paths that it did not propose."""
    return [(token, log(prob)) for token, prob in MATCHES[path].items()]


def draft(cells: SourceCells, state: _Request) -> _Draft:
    request = DraftRequest("0", np.array([1, 2], np.int32), 3, 8, num_slots=64)
    draft = _Draft(request, state, cells, ngrams, None, "previous")  # type: ignore[arg-type]
    draft.branch(0, [{5: 0.5, 7: 0.3}])
    return draft


def new_state() -> _Request:
    return _Request(8, 1, [0] * 3, [1] * 3, [[], [], []])


def test_a_token_of_both_sources_is_one_candidate() -> None:
    grown = draft(SourceCells(), new_state()).grow(3)
    found = dict(zip(grown.paths(), grown.probs, strict=True))
    assert found == pytest.approx({(5,): 0.7, (9,): 0.3, (7,): 0.3, (5, 6): 0.35})


def test_a_level_gains_what_n_grams_did_not_know() -> None:
    grown = (made := draft(SourceCells(), new_state())).grow(3)
    assert made.gain(0, grown.by_path()) == pytest.approx(0.7 - 0.4 + 0.3)
    assert made.gain(0, grown.prefix(1).by_path()) == pytest.approx(0.7 - 0.4)
    assert made.gain(1, grown.by_path()) == 0


def test_each_source_learns_what_it_is_worth() -> None:
    cells, state = SourceCells(), new_state()
    for _ in range(300):
        draft(cells, state).grow(3)
        state.expectations.settle([9, 1])
    grown = draft(cells, state).grow(1)
    found = dict(zip(grown.paths(), grown.probs, strict=True))
    assert found[9,] > 0.6
    assert found[5,] < 0.35 and found[7,] < 0.1


def test_the_frontier_and_its_ancestors_fit_the_slots() -> None:
    state = new_state()
    request = DraftRequest("0", np.array([1, 2], np.int32), 3, 8, num_slots=2)
    narrow = _Draft(request, state, SourceCells(), None, None, "previous")
    narrow.branch(0, [{5: 0.5, 7: 0.2, 8: 0.1}])
    assert narrow.nodes == list(narrow.frontier) == [(5,), (7,)]
    narrow.branch(1, [{3: 0.5}, {4: 0.5}])
    assert narrow.nodes == [(5,), (5, 3)] and list(narrow.frontier) == [(5, 3)]


def test_only_nodes_that_have_run_are_continued() -> None:
    """n-grams go on after a token that had no room; before, its hidden state was missing."""
    matches = {(): [(9, log(0.9))], (9,): [(6, log(0.9))], (9, 6): []}
    request = DraftRequest("0", np.array([1, 2], np.int32), 3, 8, num_slots=1)
    state, votes = new_state(), matches.__getitem__
    narrow = _Draft(request, state, SourceCells(), votes, None, "previous")  # type: ignore[arg-type]
    narrow.branch(0, [{5: 0.95}])
    assert list(narrow.frontier) == [(5,)]
    narrow.branch(1, [{3: 0.01}])
    assert narrow.nodes == [(5,), (5, 3)] and list(narrow.frontier) == [(5, 3)]
    assert (9, 6) in narrow.grow(3).paths()


def test_modules_that_have_missed_many_rows_begin_anew() -> None:
    """In the block of the last rows that count, with those behind them; before that, not at all."""
    state = _Request(512, 300, [0] * 3, [0] * 3, [[torch.arange(300.0)[:, None]], [], []])
    state.forget_missed(0, 300)  # all are in one block
    state.block_size = 32
    state.forget_missed(0, MAX_CAUGHT_UP)
    assert state.starts == [0, 0, 0] and len(state.inputs[0][0]) == 300
    state.forget_missed(0, 300)
    assert state.firsts == state.starts == [224, 224, 224]
    assert state.inputs[0][0].flatten().tolist() == list(range(224, 300))


def test_a_module_that_stayed_closed_begins_anew_with_those_behind_it() -> None:
    inputs = [[], [torch.zeros(293, 1)], [torch.zeros(3, 1)]]
    state = _Request(16, 300, [0] * 3, [300, 7, 4], inputs)
    state.forget_missed(1, 300)
    assert state.firsts == [0, 224, 224] and state.starts == [300, 224, 224]
    assert [len(torch.cat(inputs)) for inputs in state.inputs[1:]] == [76, 0]


@pytest.mark.parametrize("num_open", [0, 1, 2])
@pytest.mark.parametrize("reads", ["previous", "target"])
def test_closed_levels_keep_few_hidden_states(reads: HiddenStates, num_open: int) -> None:
    """Only the first levels are drafted, in each of 600 steps after a prompt of 500 tokens."""
    (proposer,) = by_levels(make("mtp3"))
    model = proposer.model = FunctionModel(mixing, 3, reads)
    model.num_caches, model.block_size = 3, 16
    proposer.absorb("r", 0, torch.zeros(500, 1))
    (state,) = proposer._requests.values()
    for end in range(501, 1100):
        token_ids = np.zeros(end, np.int32)
        draft = proposer._open(DraftRequest("r", token_ids, 3, 8, num_slots=2000))
        for level in range(num_open):
            rows = draft.rows(level)
            assert rows.num_known <= MAX_CAUGHT_UP and rows.first == state.firsts[level]
            assert len(rows.hidden_states) == rows.num_known == len(rows)
            states = torch.zeros(len(rows), 1)
            draft.advance(level, rows.num_known, states, states)
        proposer.absorb("r", end - 1, torch.zeros(1, 1))
        kept = [sum(map(len, inputs)) for inputs in state.inputs]
        assert max(kept) <= MAX_CAUGHT_UP


@pytest.mark.parametrize("start", [16, 17])
@pytest.mark.parametrize(("method", "first"), [("mtp3", 16), ("draft", 0)])
def test_modules_see_no_blocks_before_their_first(method: str, first: int, start: int) -> None:
    """An earlier request may have left out rows there; draft models leave out none."""
    (proposer,) = by_levels(make(method))
    proposer.absorb("0", start, torch.zeros(3, 1))
    (state,) = proposer._requests.values()
    assert set(state.firsts) == {first} and set(state.starts) == {start}


def depths(num_nodes: int | None, method: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How deep each of 60 steps drafts; all is right, and a level worth twice its time."""
    proposer = make(method)
    monkeypatch.setattr(CostModel, "observe", lambda *_: None)
    for part in by_levels(proposer):
        part._gate.cost = CostModel({1: 3.0 / len(by_levels(proposer))})
    decoding, bounds = Decoding(proposer, mixing), dict(max_depth=2, min_prob=0.1, token_ms=10.0)
    return [max(map(len, decoding.step(num_nodes, **bounds).paths()), default=0) for _ in range(60)]


@pytest.mark.parametrize("method", ["mtp3", "draft+draft"])
@pytest.mark.parametrize(("num_nodes", "depth"), [(None, 2), (1, 1), (0, 0)])
def test_levels_whose_nodes_get_no_rows_are_left_out(method, num_nodes, depth, monkeypatch) -> None:
    drafted = depths(num_nodes, method, monkeypatch)
    assert sorted(drafted[30:])[15] == depth, drafted
