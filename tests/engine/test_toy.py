"""A drafting method takes one file: this one, with all of its tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import log
from pathlib import Path

import pytest

from tests.engine.engines import get_engine, reference
from tests.engine.features import assert_equal, requests
from tests.proposers.conformance import check_proposer, make
from vllm_specplus.config import METHODS
from vllm_specplus.core.growth import Candidates, grow
from vllm_specplus.proposers.base import DraftRequest, Proposer
from vllm_specplus.proposers.registry import PROPOSERS, register


class Toy(Proposer):
    """Says that the text goes on with one of the tokens it had last, whatever came before."""

    def propose(self, requests: Sequence[DraftRequest]) -> list[Candidates]:
        return [self._propose(request) for request in requests]

    def _propose(self, request: DraftRequest) -> Candidates:
        recent = dict.fromkeys(request.token_ids[:-13:-1].tolist())
        children = [(token, log(0.1) - place / 9) for place, token in enumerate(recent)]
        bounds = request.max_nodes, request.max_depth, request.min_prob, self.paths(request)
        return grow(lambda _: children, *bounds)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register("toy")(Toy)
    yield
    del PROPOSERS["toy"], METHODS["toy"]


def test_it_conforms():
    check_proposer(lambda: make("toy"))


@pytest.mark.parametrize("feature", ["greedy", "seed"])
def test_text_equals_plain(feature):
    asked = requests(feature, 4)
    engine = get_engine("llama", "dynamic", speculative_model="[toy]")
    assert_equal(engine.run(asked), reference("llama", asked))
    assert engine.probe.drafted > 0 and (engine.probe.accepted > 0 or feature == "seed")


def test_it_is_short():
    assert len(Path(__file__).read_text().splitlines()) < 60
