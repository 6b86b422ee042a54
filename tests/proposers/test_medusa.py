"""Medusa's heads run where they are worth their time, and n-grams go on without them.

Seen to fail: a gate that is not asked, one that learns nothing, drafts of n-grams thrown away.
"""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch

from vllm_specplus.config import SpecPlusConfig
from vllm_specplus.core.cost import CostModel
from vllm_specplus.core.growth import Candidates
from vllm_specplus.proposers import medusa
from vllm_specplus.proposers.base import DraftRequest
from vllm_specplus.proposers.level_gate import LevelGate
from vllm_specplus.proposers.medusa import MedusaProposer

NUM_HEADS, STEPS, TEXT = 3, 600, [5, 6, 7, 8, 9]


class Heads:
    """Sure of one token each and right, or half sure and wrong; counts how often they run."""

    def __init__(self, right: bool, ms: float) -> None:
        self.right, self.ms, self.runs, self.after, self.now = right, ms, 0, 0, 0.0

    def perf_counter(self) -> float:
        return self.now

    def best(
        self, hidden: torch.Tensor, num_heads: int, num: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.runs, self.now = self.runs + 1, self.now + self.ms / 1e3
        ahead = [(self.after + k) % len(TEXT) for k in range(num_heads)]
        tokens = [TEXT[place] if self.right else 99 for place in ahead]
        shape = len(hidden), num_heads, 1
        logprobs = torch.full(shape, -0.2 if self.right else -1.2)
        return torch.tensor(tokens).view(1, num_heads, 1).expand(shape), logprobs


def run(method: str, right: bool, heads_ms: float, pays: bool = True) -> tuple[Heads, int]:
    """Steps of one request whose text is TEXT again and again, of which the heads count the second
    half, when it is known what they are worth; tokens of the smallest draft there.

    pays: whether the budget gives drafts rows."""
    options = {"num_speculative_tokens": NUM_HEADS, "tree": "dynamic:8"}
    config = SpecPlusConfig.from_options({"speculative_model": f"[{method}]HEADS"} | options)
    proposer, heads = MedusaProposer(config), Heads(right, heads_ms)
    proposer.model, proposer.num_heads = heads, NUM_HEADS
    proposer._gate.cost = CostModel({1: heads_ms})
    drafts = 0
    for step in range(STEPS):
        length = 20 + step
        text = np.resize(np.array(TEXT), length)
        heads.after, heads.runs = length, heads.runs if 2 * step != STEPS else 0
        proposer.absorb("a", length - 2, torch.zeros(1, 4))
        request = DraftRequest("a", text, NUM_HEADS, 8, min_prob=0.1, token_ms=100.0)
        with mock.patch.object(medusa, "time", heads):
            (candidates,) = proposer.propose([request])
            proposer.granted([candidates if pays else Candidates()])
        drafts = min(drafts, len(candidates)) if 2 * step > STEPS else len(candidates)
    return heads, drafts


@pytest.mark.parametrize("method", ["medusa", "medusa+ngram"])
def test_wrong_heads_are_left_out(method: str) -> None:
    heads, drafts = run(method, right=False, heads_ms=20)
    assert 0 < heads.runs < STEPS / 20
    assert (drafts > 0) == ("ngram" in method)


def test_right_heads_run_while_they_are_cheap() -> None:
    assert run("medusa", right=True, heads_ms=20)[0].runs == STEPS / 2
    assert run("medusa", right=True, heads_ms=500)[0].runs < STEPS / 20


def test_heads_whose_drafts_get_no_rows_are_left_out() -> None:
    assert run("medusa", right=True, heads_ms=20, pays=False)[0].runs < STEPS / 20


def test_heads_that_add_nothing_to_ngrams_are_left_out() -> None:
    heads, drafts = run("medusa+ngram", right=True, heads_ms=20)
    assert drafts > 0 and heads.runs < STEPS / 4


def test_heads_gain_what_n_grams_did_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[float] = []
    monkeypatch.setattr(LevelGate, "observe", lambda _, __, ___, gains, ____: heard.extend(gains))
    run("medusa", right=True, heads_ms=20)
    alone, heard[:] = np.mean(heard), []
    run("medusa+ngram", right=True, heads_ms=20)
    assert alone > 1 and np.mean(heard[len(heard) // 2 :]) < 0.5
