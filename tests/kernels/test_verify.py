"""verify: each rule reaches its op, and what is not exact is refused."""

from __future__ import annotations

import doctest
import sys
from typing import Any

import pytest
import torch
from specplus_kernels.rejection import rejection
from specplus_kernels.tree_rejection import tree_rejection
from specplus_kernels.tree_verify import tree_verify
from specplus_kernels.verify import RULES, verify

from tests.kernels.verify_case import batch, draw_drafts

CASE = batch([[-1, 0, 1, 2]] * 12)
KEYED: dict[str, Any] = dict(
    cu_num_rows=CASE.cu_num_rows,
    temperature=torch.ones(48),
    seeds=CASE.seeds,
    positions=CASE.positions,
    max_rows=4,
)


def test_each_rule_reaches_its_op() -> None:
    logits, draft_logits = torch.randn(48, 6), torch.randn(48, 6)
    is_sampled = torch.rand(48) < 0.7
    drafts = draw_drafts(CASE, draft_logits, is_sampled)
    tree: dict[str, Any] = dict(
        parents=CASE.parents, draft_logits=draft_logits, is_sampled=is_sampled
    )
    chain: dict[str, Any] = dict(draft_logits=draft_logits, is_sampled=is_sampled)
    found = {
        "match": verify("match", logits, drafts, parents=CASE.parents, **KEYED),
        "rejection": verify("rejection", logits, drafts, **chain, **KEYED),
        "block": verify("block", logits, drafts, **chain, **KEYED),
        "recursive": verify("recursive", logits, drafts, **tree, **KEYED),
        "traversal": verify("traversal", logits, drafts, **tree, **KEYED),
        "typical": verify("typical", logits, drafts, allow_lossy=True, **KEYED),
    }
    drawn: dict[str, Any] = dict(logits=logits, draft_logits=draft_logits, draft_tokens=drafts)
    drawn |= dict(is_sampled=is_sampled)
    wanted = {
        "match": tree_verify(logits, drafts, CASE.parents, **KEYED)[0],
        "rejection": rejection("standard", **drawn, **KEYED),
        "block": rejection("block", **drawn, **KEYED),
        "recursive": tree_rejection("recursive", parents=CASE.parents, **drawn, **KEYED),
        "traversal": tree_rejection("traversal", parents=CASE.parents, **drawn, **KEYED),
        "typical": tree_rejection("typical", logits, None, drafts, None, is_sampled=None, **KEYED),
    }
    assert set(found) == set(RULES)
    for rule, result in found.items():
        assert [t.tolist() for t in result] == [t.tolist() for t in wanted[rule]], rule
    assert len({str(result.tokens.tolist()) for result in found.values()}) == 4
    assert torch.equal(found["rejection"].tokens, found["recursive"].tokens)
    assert torch.equal(found["block"].tokens, found["traversal"].tokens)


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        ("greedy", {}, "rule is 'greedy'"),
        ("match", dict(draft_logits=torch.zeros(48, 6)), "'match' takes deterministic nodes"),
        ("rejection", dict(parents=CASE.parents), "'rejection' takes chains"),
        ("block", dict(parents=CASE.parents), "'block' takes chains"),
        ("typical", {}, "allow_lossy"),
        ("recursive", dict(is_sampled=torch.ones(48, dtype=torch.bool)), "need draft_logits"),
    ],
)
def test_refusals(rule: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        verify(rule, torch.zeros(48, 6), torch.zeros(48).long(), **options, **KEYED)


@pytest.mark.parametrize("op", ["verify", "tree_verify", "rejection", "tree_rejection"])
def test_worked_examples(op: str) -> None:
    """By module: the package's name is the op of that name."""
    failed, tried = doctest.testmod(sys.modules[f"specplus_kernels.{op}"])
    assert tried and not failed
