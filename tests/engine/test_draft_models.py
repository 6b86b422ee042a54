"""Trees of EAGLE, EAGLE-3 and draft models on the CPU engine: the text stays that of plain
decoding, and the drafts are what the model gives over the whole sequence.

Every sabotage in `SABOTAGES` changes drafts, and those of `test_a_draft_by_heart` are rejected.
"""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from tests.engine.drafters import AUX_LAYERS, DRAFT_VOCAB, drafter_path
from tests.engine.engines import Engine, Request, get_engine
from tests.engine.features import assert_equal
from tests.engine.test_mtp import PROB_TOLERANCE, watch_drafts
from tests.engine.test_mtp_modules import (
    DEPTH,
    OPTIONS,
    engine,
    mismatches,
    of_other_positions,
    other_positions,
    other_slots,
    plain,
    requests,
)
from vllm_specplus.engine.drafters.models_v1 import PagedModel
from vllm_specplus.proposers import by_level
from vllm_specplus.proposers.merged import by_levels

CHAIN = "static:[(0,),(0,0),(0,0,0)]"
BRANCHES = "static:[(0,),(1,),(0,0),(0,1),(1,0),(0,0,0)]"
STATE_TOLERANCE = 1e-4
"""fp32: layers of vLLM and of Hugging Face."""


def drafting(drafter: str, tree: str = "dynamic:8", ngram: bool = False, **options) -> Engine:
    """A target and a drafter, whose name begins with its method or ends with it."""
    method = drafter.split()[0] if drafter.startswith("eagle") else "draft"
    return engine("target", method + "+ngram" * ngram, tree, drafter, **options)


def ungated(run_by: Engine) -> Engine:
    """Levels are drafted whatever time they take."""
    for part in by_levels(run_by.spec_round.proposer):
        part._gate.cost = None
    return run_by


@pytest.mark.parametrize(
    ("drafter", "tree", "ngram"),
    [
        ("draft", "dynamic:8", False),
        ("draft", BRANCHES, True),
        ("small draft", "dynamic:8", True),
        ("eagle", "dynamic:8", False),
        ("eagle", "chain", True),
        ("eagle3", BRANCHES, False),
        ("eagle3", "dynamic:8", True),
        ("eagle3 reduced", "dynamic:8", False),
    ],
)
def test_text_equals_plain(drafter: str, tree: str, ngram: bool) -> None:
    asked = requests(4) + requests(2, temperature=1, seed=7)
    expected, ours = plain("target", asked), ungated(drafting(drafter, tree, ngram))
    assert_equal(ours.run(asked), expected)
    assert ours.extra_tokens > len(asked) * (1 if "small" not in drafter else 0.5)
    for one, output in zip(asked[::5], expected[::5], strict=True):
        assert_equal(ours.run([one]), [output])


def test_two_draft_models() -> None:
    """One of them is right: the other one's tree takes nothing from it, and only adds."""
    path, random = drafter_path("target"), drafter_path("small draft")
    asked = requests(4, max_tokens=29) + requests(2, temperature=1, seed=7)
    expected, accepted = plain("target", asked), []
    for text in (f"[draft]{random}", f"[draft]{random}+[draft]{path}"):
        options = dict(speculative_model=text, num_speculative_tokens=DEPTH, **OPTIONS)
        ours = get_engine(
            drafter_path("target"), "dynamic", speculative_tree="dynamic:8", **options
        )
        assert_equal(ungated(ours).run(asked), expected)
        accepted.append(ours.extra_tokens)
    assert accepted[1] > 2 * accepted[0] > 0


@pytest.mark.parametrize("drafter", ["draft", "eagle3"])
def test_preemption_and_the_prefix_cache(drafter: str) -> None:
    asked = requests(6, max_tokens=80)
    few: dict[str, Any] = dict(num_gpu_blocks_override=10, max_model_len=256)
    few |= dict(max_num_batched_tokens=64, prefix_cache_retention_interval=None)
    ours = ungated(drafting(drafter, ngram=True, **few))
    preempt = ours.scheduler._preempt_request
    expected = plain("target", asked)
    with mock.patch.object(ours.scheduler, "_preempt_request", side_effect=preempt) as preempted:
        assert_equal(ours.run(asked), expected)
        assert preempted.called
    known = [*asked[-1].prompt, *expected[-1].outputs[0].token_ids, 5]
    again = [Request(known, asked[-1].params)]
    (output,) = ours.run(again, keep_cache=True)
    assert_equal([output], plain("target", again))
    assert output.num_cached_tokens > 0


def test_a_draft_model_of_a_shorter_length_drafts_up_to_it() -> None:
    asked, ours = requests(4, max_tokens=70), ungated(drafting("short draft"))
    with pytest.MonkeyPatch.context() as patch:
        drafted, _ = watch_drafts(patch)
        assert_equal(ours.run(asked), plain("target", asked))
    assert max(len(known) + len(path) for known, path, _ in drafted) == 48


def of_other_tokens(monkeypatch) -> None:
    """Rows take the token before theirs."""
    run = PagedModel._run
    monkeypatch.setattr(
        PagedModel,
        "_run",
        lambda self, level, tokens, *rows: run(self, level, tokens.roll(1), *rows),
    )


def missed_rows(monkeypatch) -> None:
    """What drafted nodes left stays where the first accepted token's row belongs."""
    rows = by_level._Draft.rows

    def fewer(self, level):
        self.state.starts[0] += not level and self._end(0) - self.state.starts[0] > 1
        return rows(self, level)

    monkeypatch.setattr(by_level._Draft, "rows", fewer)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("sabotage", [None, of_other_tokens, other_positions, other_slots])
def test_a_draft_by_heart(sabotage, batch_size, monkeypatch) -> None:
    """The target as its own draft model: all is accepted, at every depth."""
    asked = requests(4, max_tokens=29)
    ours = ungated(drafting("target", CHAIN, max_num_batched_tokens=16))
    if sabotage is not None:
        sabotage(monkeypatch)
    outputs: list[Any] = []
    drafted, accepted = Counter[int](), Counter[int]()
    observe = ours.spec_round.observe

    def observed(req_id, chain, rows, tokens):
        drafted.update(range(len(chain)))
        accepted.update(range(len(rows)))
        observe(req_id, chain, rows, tokens)

    monkeypatch.setattr(ours.spec_round, "observe", observed)
    for first in range(0, len(asked), batch_size):
        outputs += ours.run(asked[first : first + batch_size])
    assert_equal(outputs, plain("target", asked))
    rates = [accepted[depth] / drafted[depth] for depth in range(DEPTH)]
    assert (min(rates) > 0.9) == (sabotage is None), rates
    assert accepted[DEPTH - 1] > 20 or sabotage


@pytest.mark.parametrize(
    ("drafter", "tree", "sabotage"),
    [
        ("eagle", CHAIN, None),
        ("eagle", "dynamic:8", None),
        ("eagle3", "dynamic:8", None),
        ("eagle3 reduced", "dynamic:8", None),
        *(
            (drafter, "dynamic:8", sabotage)
            for drafter in ("eagle", "eagle3")
            for sabotage in (of_other_positions, other_positions, other_slots)
        ),
    ],
)
@torch.inference_mode()
def test_drafts_of_eagle(drafter, tree, sabotage) -> None:
    """They are those of the head over the whole sequence at once."""
    ours, wrong = ungated(drafting(drafter, tree, ngram=True, max_num_batched_tokens=16)), 0
    for request in requests(2, max_tokens=12):
        with pytest.MonkeyPatch.context() as patch:
            if sabotage is not None:
                sabotage(patch)
            drafted, hidden_states = watch_drafts(patch)
            ours.run([request])
        assert {len(path) for _, path, _ in drafted} == {0, 1, 2}
        wrong += mismatches(drafted, hidden_states, ours.spec_round.proposer.model, "previous")
        if "reduced" in drafter:
            assert {token for *_, below in drafted for token in below} <= {*DRAFT_VOCAB}
    assert (wrong == 0) == (sabotage is None), wrong


@pytest.mark.parametrize("sabotage", [None, of_other_tokens, other_slots, missed_rows])
@torch.inference_mode()
def test_drafts_of_a_draft_model(sabotage) -> None:
    """They are those of the model in Hugging Face's code, after every path of the trees."""
    reference = AutoModelForCausalLM.from_pretrained(drafter_path("draft"), dtype=torch.float32)
    ours, wrong = ungated(drafting("draft", ngram=True, max_num_batched_tokens=16)), 0
    with pytest.MonkeyPatch.context() as patch:
        if sabotage is not None:
            sabotage(patch)
        drafted, _ = watch_drafts(patch)
        ours.run(requests(4, max_tokens=12))
    assert {len(path) for _, path, _ in drafted} == {0, 1, 2}
    for known, path, below in drafted:
        logits = reference(torch.tensor([[*known, *path]])).logits[0, -1]
        probs = functional.softmax(logits, 0).tolist()
        wrong += any(abs(probs[token] - prob) > PROB_TOLERANCE for token, prob in below.items())
    assert (wrong == 0) == (sabotage is None), wrong


@torch.inference_mode()
def test_eagle3_starts_from_several_layers_of_the_target() -> None:
    """Seen to fail with the layers in another order, and with rows that do not move when a path is
    accepted."""
    target = AutoModelForCausalLM.from_pretrained(drafter_path("target"), dtype=torch.float32)
    asked, ours = requests(4), ungated(drafting("eagle3", ngram=True, max_num_batched_tokens=16))
    for request, expected in zip(asked, plain("target", asked), strict=True):
        tokens = [*request.prompt, *expected.outputs[0].token_ids]
        with pytest.MonkeyPatch.context() as patch:
            _, hidden_states = watch_drafts(patch)
            ours.run([request])
        layers = target(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        combined = ours.spec_round.proposer.model.combine([layers[i][0] for i in AUX_LAYERS])
        seen = torch.stack([hidden_states[t] for t in range(len(tokens) - 1)])
        torch.testing.assert_close(seen, combined[: len(seen)], atol=STATE_TOLERANCE, rtol=0)
