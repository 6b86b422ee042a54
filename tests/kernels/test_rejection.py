"""rejection: both rules exact by enumeration, the kernels against the reference, one coin a node.

As in test_tree_rejection.py: the reference, which follows the papers on chains, is proved exact by
enumerating every draw and every coin; the kernels, which are those of trees, are proved equal to it
on the same keyed noise, which also proves that a chain is a tree of width 1.

Seen to fail: block with min(1, .) on each ratio instead of on the running product, h without 1 - w,
the first row with coin < h instead of the last, p as the residual.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from specplus_kernels import dispatch
from specplus_kernels.rejection import ChainRule, reference, rejection
from specplus_kernels.tree_verify import tree_verify

from tests.kernels.verify_case import Batch, Walk, World, batch, check_positions, draw_drafts

RULES: list[ChainRule] = ["standard", "block"]
WALKS: dict[str, Walk] = {"standard": reference._standard, "block": reference._block}
ROUNDING = 1e-12  # sums of some thousand products in double
CHAIN = [-1, 0, 1, 2]


def chains(*lengths: int, padding: int = 0) -> Batch:
    return batch([list(range(-1, length - 1)) for length in lengths], padding)


@pytest.mark.parametrize("kinds", ["TTT", "FFF", "TFT", "FTT", "TTF"])
@pytest.mark.parametrize("rule", RULES)
def test_what_is_emitted_has_the_targets_distribution(rule: str, kinds: str) -> None:
    world = World(vocab_size=3, depth=3)
    found = world.joint(WALKS[rule], CHAIN, [True, *(kind == "T" for kind in kinds)])
    torch.testing.assert_close(found, world.plain((), 4), atol=ROUNDING, rtol=0)


def test_block_accepts_no_less_than_standard() -> None:
    gains = []
    for _ in range(4):
        world = World(vocab_size=3, depth=3)
        standard, block = (world.mean_path(WALKS[rule], CHAIN, [True] * 4) for rule in RULES)
        gains.append(block - standard)
    assert min(gains) > -ROUNDING and max(gains) > 1e-3


def run(
    rule: ChainRule,
    case: Batch,
    logits: torch.Tensor,
    draft_logits: torch.Tensor | None,
    drafts: torch.Tensor,
    is_sampled: torch.Tensor | None = None,
    temperature: torch.Tensor | float = 1.0,
) -> Any:
    if isinstance(temperature, float):
        temperature = torch.full((len(drafts),), temperature)
    return rejection(
        rule,
        logits,
        draft_logits,
        drafts,
        case.cu_num_rows,
        is_sampled,
        temperature,
        case.seeds,
        case.positions,
        max_rows=case.max_rows,
    )


def check_equals_reference(rule: ChainRule, *arguments: Any) -> Any:
    result = run(rule, *arguments)
    with dispatch.force("reference"):
        expected = run(rule, *arguments)
    assert [t.tolist() for t in result] == [t.tolist() for t in expected]
    return result


@pytest.mark.parametrize("kinds", ["sampled", "mixed", "deterministic"])
@pytest.mark.parametrize("rule", RULES)
def test_equals_reference(gpu_provider: str, rule: ChainRule, kinds: str) -> None:
    """Ragged, with empty requests, padding, placeholders, greedy requests and strided logits."""
    case = chains(*[4] * 8, 1, 0, 7, 3, padding=2)
    num_rows, vocab_size = len(case.parents), 8
    logits = torch.randn(num_rows, vocab_size + 3)[:, 1 : 1 + vocab_size]
    draft_logits = (logits + 0.7 * torch.randn(num_rows, vocab_size)).half()
    is_sampled = torch.rand(num_rows) < {"sampled": 1.0, "mixed": 0.5, "deterministic": 0.0}[kinds]
    drafts = draw_drafts(case, draft_logits, is_sampled)
    drafts[6] = -1
    temperature = torch.ones(num_rows)
    temperature[:4] = 0.0
    result = check_equals_reference(
        rule,
        case,
        logits,
        None if kinds == "deterministic" else draft_logits,
        drafts,
        is_sampled if kinds == "mixed" else None,
        temperature,
    )
    assert result.num_emitted[9] == 0 and 1 <= result.num_emitted[1] <= 2


@pytest.mark.parametrize("length", [63, 65])
@pytest.mark.parametrize("rule", RULES)
def test_identical_draft_and_target_accept_everything(
    gpu_provider: str, rule: ChainRule, length: int
) -> None:
    case = chains(length)
    logits = torch.randn(length, 9)
    drafts = draw_drafts(case, logits, torch.ones(length))
    result = run(rule, case, logits, logits.clone(), drafts)
    assert result.path[0].tolist() == list(range(length))
    assert result.tokens[0, :-1].tolist() == drafts[1:].tolist()


@pytest.mark.parametrize("rule", RULES)
def test_greedy_and_undrafted_equal_tree_verify(gpu_provider: str, rule: ChainRule) -> None:
    case = chains(5, 5, 1, 1, 1)
    num_rows = len(case.parents)
    logits = torch.randint(-2, 3, (num_rows, 5)).float()
    drafts = torch.cat([torch.tensor([-1]), logits.argmax(1)[:-1]])
    drafts[8] = (drafts[8] + 1) % 5
    temperature = torch.cat([torch.zeros(10), torch.ones(3)])
    result = run(rule, case, logits, torch.randn(num_rows, 5), drafts, None, temperature)
    matched, _ = tree_verify(
        logits,
        drafts,
        None,
        case.cu_num_rows,
        temperature,
        case.seeds,
        case.positions,
        max_rows=case.max_rows,
    )
    assert [t.tolist() for t in result] == [t.tolist() for t in matched]
    assert result.num_emitted.tolist() == [5, 3, 1, 1, 1]


@pytest.mark.parametrize("rule", RULES)
def test_wide_vocabulary(gpu_provider: str, rule: ChainRule) -> None:
    case, vocab_size = chains(2), 151_936
    logits, draft_logits = torch.randn(2, vocab_size), torch.randn(2, vocab_size)
    drafts = torch.tensor([-1, 150_000])
    draft_logits[0, 150_000] = 20.0
    result = check_equals_reference(rule, case, logits, draft_logits, drafts)
    assert result.num_emitted.tolist() == [1]


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("draft", ["friendly", "hostile"])
def test_keyed_noise_follows_the_target(rule: ChainRule, draft: str) -> None:
    requests, length = 2500, 4
    case = chains(*[length] * requests)
    target = torch.tensor([1.0, 0.0, -1.0, 2.0, -torch.inf, 0.5])
    q = {"friendly": torch.nan_to_num(target, 0.0, 0.0, -1.0), "hostile": -target.clamp(-2)}[draft]
    rows = length * requests
    drafts = torch.multinomial(q.softmax(0), rows, replacement=True)
    with dispatch.force("reference"):
        result = run(rule, case, target.expand(rows, -1), q.expand(rows, -1), drafts)
    check_positions(result.tokens, target.double().softmax(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(rule="recursive"), "rule is 'recursive'"),
        (dict(max_rows=2), "max_rows allows 2"),
        (dict(draft_logits=torch.zeros(3, 5).long()), "draft_logits must be bf16"),
        (dict(logits=torch.zeros(5, 3).T), "contiguous rows"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    index = torch.zeros(3, dtype=torch.int64)
    good: dict[str, Any] = dict(
        rule="standard",
        logits=torch.zeros(3, 5),
        draft_logits=torch.zeros(3, 5),
        draft_tokens=index,
        cu_num_rows=torch.tensor([0, 3], dtype=torch.int32),
        is_sampled=None,
        temperature=torch.zeros(3),
        seeds=index,
        positions=index,
        max_rows=3,
    )
    rejection(**good)
    with pytest.raises(ValueError, match=message):
        rejection(**good | change)
