"""Every registered proposer keeps what conformance.py says."""

from __future__ import annotations

import pytest

from tests.proposers.conformance import ALL_METHODS, Decoding, check_proposer, make, mixing


@pytest.mark.parametrize("method", ALL_METHODS)
def test_conformance(method: str) -> None:
    check_proposer(lambda: make(method))


def test_medusa_drafts_every_rank_of_a_static_tree() -> None:
    tree = f"static:{[(rank,) for rank in range(12)]}"
    assert len(Decoding(make("medusa", tree=tree), mixing).step()) == 12
