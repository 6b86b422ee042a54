"""Every registered proposer keeps what conformance.py says; what drafts by levels does so beside a
model that knows the target by heart, which sees only what it should.

Seen to fail for these: nodes one position on, rows of the first committed token left out, tokens
of the position before, the hidden state of another path.
"""

from __future__ import annotations

import pytest

from tests.proposers.conformance import (
    AT_ONCE,
    BY_LEVELS,
    PROMPT,
    Decoding,
    Target,
    check_proposer,
    check_steps,
    make,
    mixing,
)
from tests.proposers.levels_model import FunctionModel
from vllm_specplus.proposers.merged import by_levels


@pytest.mark.parametrize("method", AT_ONCE)
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
    assert not any(part._requests for part in by_levels(shared))
    assert not getattr(shared, "_requests", None)


def test_two_draft_models_know_more_than_one() -> None:
    """Each knows every other token: alone half of them are drafted, together all."""

    def half(number: int) -> Target:
        return lambda tokens: mixing(tokens) + (mixing(tokens) % 2 == number)

    both = make("draft+draft")
    alone = [make("draft"), make("draft")]
    for number, parts in enumerate(zip(by_levels(both), alone, strict=True)):
        for part in parts:
            part.model = FunctionModel(half(number), 4, None)  # type: ignore[attr-defined]
    together, *apart = (Decoding(one, mixing) for one in (both, *alone))
    for decoding in (together, *apart):
        for _ in range(40):
            decoding.step()
    assert together.tokens_per_round > 1.3 * max(one.tokens_per_round for one in apart)


def test_medusa_drafts_every_rank_of_a_static_tree() -> None:
    tree = f"static:{[(rank,) for rank in range(12)]}"
    assert len(Decoding(make("medusa", tree=tree), mixing).step()) == 12
