"""Every registered proposer that needs no model keeps what conformance.py says."""

from __future__ import annotations

import pytest

from tests.proposers.conformance import WITHOUT_MODEL, check_proposer, make


@pytest.mark.parametrize("method", WITHOUT_MODEL)
def test_conformance(method: str) -> None:
    check_proposer(lambda: make(method))
