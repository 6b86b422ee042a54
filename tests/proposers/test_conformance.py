"""Every registered proposer keeps what conformance.py says; what drafts by levels does so beside a
model that knows the target by heart, which sees only what it should.

Seen to fail for these: nodes one position on, rows of the first committed token left out, tokens
of the position before, the hidden state of another path.
"""

from __future__ import annotations

import pytest

from tests.proposers.conformance import (
    BY_LEVELS,
    PROMPT,
    WITHOUT_MODEL,
    Decoding,
    check_proposer,
    check_steps,
    make,
    mixing,
)
from vllm_specplus.proposers.mtp import MtpProposer


@pytest.mark.parametrize("method", WITHOUT_MODEL)
def test_conformance(method: str) -> None:
    check_proposer(lambda: make(method))


@pytest.mark.parametrize("method", BY_LEVELS)
def test_by_levels(method: str) -> None:
    decoding = check_steps(lambda: make(method))
    assert decoding.tokens_per_round == 1 + decoding.proposer.config.num_speculative_tokens
    shared = make(method)
    together = [Decoding(shared, mixing, [*PROMPT, 5, n], str(n), n) for n in range(3)]
    apart = [Decoding(make(method), mixing, [*PROMPT, 5, n], str(n), n) for n in range(3)]
    drafts = shared.propose([one.request() for one in together])
    assert drafts == [one.proposer.propose([one.request()])[0] for one in apart]
    for one in together:
        shared.forget(one.req_id)
    assert isinstance(shared, MtpProposer) and not shared._requests
