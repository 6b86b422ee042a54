"""Every registered proposer keeps what conformance.py says."""

from __future__ import annotations

import pytest

from tests.proposers.conformance import ALL_METHODS, check_proposer, make


@pytest.mark.parametrize("method", ALL_METHODS)
def test_conformance(method: str) -> None:
    check_proposer(lambda: make(method))
