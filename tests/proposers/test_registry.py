"""Methods by name."""

from __future__ import annotations

import pytest

from vllm_specplus.config import SpecPlusConfig
from vllm_specplus.proposers.by_level import LevelProposer
from vllm_specplus.proposers.lookahead import LookaheadProposer
from vllm_specplus.proposers.medusa import MedusaProposer
from vllm_specplus.proposers.ngram import NgramProposer
from vllm_specplus.proposers.registry import create


def config(model: str) -> SpecPlusConfig:
    options = {"speculative_model": model, "num_speculative_tokens": 3, "tree": "dynamic:4"}
    return SpecPlusConfig.from_options(options)


def test_ngram_is_there() -> None:
    proposer = create(config("[ngram]"))
    assert isinstance(proposer, NgramProposer)
    assert proposer.config.num_nodes == 4


@pytest.mark.parametrize("model", ["[mtp]x", "[mtp3]x", "[mtp3+ngram]x", "[ngram+mtp3]x"])
def test_heads_may_be_joined_by_ngrams(model: str) -> None:
    proposer = create(config(model))
    assert isinstance(proposer, LevelProposer) and proposer.drafter.model == "x"
    assert isinstance(create(config("[ngram+medusa]x")), MedusaProposer)


@pytest.mark.parametrize("model", ["[lookahead]", "[ngram+lookahead]"])
def test_lookahead_takes_its_shape_from_its_window(model: str) -> None:
    proposer = create(SpecPlusConfig.from_options({"speculative_model": model}))
    assert isinstance(proposer, LookaheadProposer)
    assert (proposer.config.num_speculative_tokens, proposer.config.num_nodes) == (6, 29)


@pytest.mark.parametrize("model", ["[eagle]x", "some/model", "[ngram+eagle3]x"])
def test_draft_models_of_vllm_may_be_joined_by_ngrams(model: str) -> None:
    assert isinstance(create(config(model)), LevelProposer)


@pytest.mark.parametrize("model", ["[suffix]", "[ngram+suffix]"])
def test_what_is_not_built_names_what_is(model: str) -> None:
    with pytest.raises(NotImplementedError, match=r"speculative_model=.*available.*\[ngram\]"):
        create(config(model))
