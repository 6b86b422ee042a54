"""tree_rejection: exactness by enumeration, the kernels against the reference, special values.

The reference is proved exact: over a tiny vocabulary every draw of a tree and every answer of its
coins is enumerated, and what the rules emit has the target's distribution to rounding. The kernels
are proved equal to the reference on the same keyed noise. Chi-square tests check that the keyed
noise itself is as good as independent.

Seen to fail by enumeration: a residual that is not renormalised, siblings with replacement, q
instead of the point mass of a deterministic node, a weight doubled, a divisor without 1 - |m|. By
equality: `taken` not accumulated over the elders, a scale that forgets the older divisors, elders
left in the tail of q, a rejected child that may return as bonus, a sibling skipped, the noise of
the wrong row, a parent's state lost below it, its mass not updated, NaN ignored, exp(H) instead of
exp(-H).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from specplus_kernels import dispatch
from specplus_kernels.tree_rejection import TreeRule, reference, tree_rejection
from specplus_kernels.tree_verify import tree_verify

from tests.kernels import verify_case
from tests.kernels.verify_case import (
    SHAPES,
    Batch,
    Walk,
    World,
    batch,
    check_positions,
    draw_drafts,
)

EXACT: list[TreeRule] = ["recursive", "traversal"]
RULES: list[TreeRule] = [*EXACT, "typical"]
ROUNDING = 1e-12  # sums of some thousand products in double
WALKS: dict[str, Walk] = {
    "recursive": reference._recursive,
    "traversal": lambda tree: reference._traversal(tree, 0, 1.0) or (0, tree.target[0]),
}
TREES = {
    "chain": [-1, 0, 1],
    "siblings": [-1, 0, 0],
    "all_siblings": [-1, 0, 0, 0],
    "deep_first": [-1, 0, 1, 0, 3],
    "wide_first": [-1, 0, 0, 1, 1],
    "deep_second": [-1, 0, 0, 2, 2],
}
KINDS: dict[str, Callable[[int], bool]] = {
    "sampled": lambda node: True,
    "deterministic": lambda node: False,
    "odd": lambda node: node % 2 == 1,
    "even": lambda node: node % 2 == 0,
}


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("rule", EXACT)
def test_what_is_emitted_has_the_targets_distribution(rule: str, tree: str, kinds: str) -> None:
    parents = TREES[tree]
    world = World(vocab_size=3, depth=2)
    is_sampled = [KINDS[kinds](node) for node in range(len(parents))]
    found = world.joint(WALKS[rule], parents, is_sampled)
    torch.testing.assert_close(found, world.plain((), 3), atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("tree", TREES)
def test_traversal_accepts_no_less_than_recursive(tree: str) -> None:
    parents = TREES[tree]
    gains = []
    for _ in range(3):
        world, kinds = World(vocab_size=3, depth=2), [True] * len(parents)
        recursive, traversal = (world.mean_path(WALKS[rule], parents, kinds) for rule in EXACT)
        gains.append(traversal - recursive)
    assert min(gains) > -ROUNDING
    if max(parents) > 0:
        assert max(gains) > 1e-4


def run(
    rule: TreeRule,
    case: Batch,
    logits: torch.Tensor,
    draft_logits: torch.Tensor | None,
    drafts: torch.Tensor,
    is_sampled: torch.Tensor | None = None,
    temperature: torch.Tensor | float = 1.0,
    **options: Any,
) -> Any:
    if isinstance(temperature, float):
        temperature = torch.full((len(drafts),), temperature)
    return tree_rejection(
        rule,
        logits,
        draft_logits,
        drafts,
        case.parents,
        case.cu_num_rows,
        is_sampled,
        temperature,
        case.seeds,
        case.positions,
        max_rows=case.max_rows,
        **options,
    )


def check_equals_reference(rule: TreeRule, *arguments: Any, **options: Any) -> Any:
    result = run(rule, *arguments, **options)
    with dispatch.force("reference"):
        expected = run(rule, *arguments, **options)
    for found, wanted in zip(result, expected, strict=True):
        assert found.tolist() == wanted.tolist()
        assert found.dtype == wanted.dtype
    return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kinds", ["sampled", "mixed"])
@pytest.mark.parametrize("rule", RULES)
def test_equals_reference(
    gpu_provider: str, rule: TreeRule, kinds: str, dtype: torch.dtype
) -> None:
    """Ragged, with empty requests, padding, placeholders, greedy requests and strided logits."""
    rng = random.Random(f"{rule} {kinds}")
    trees = [*SHAPES.values(), [], *(verify_case.random_tree(7, rng) for _ in range(5)), []]
    case = batch(trees, padding=2)
    num_rows, vocab_size = len(case.parents), 7
    logits = (1.5 * torch.randn(num_rows, vocab_size + 5)).to(dtype)[:, 2 : 2 + vocab_size]
    draft_logits = (logits.float() + torch.randn(num_rows, vocab_size)).to(dtype)
    is_sampled = torch.rand(num_rows) < (0.6 if kinds == "mixed" else 1.0)
    drafts = draw_drafts(case, draft_logits, is_sampled)
    drafts[torch.rand(num_rows) < 0.1] = -1
    temperature = torch.ones(num_rows)
    temperature[: len(SHAPES["one"]) + len(SHAPES["chain"])] = 0.0
    result = check_equals_reference(
        rule,
        case,
        logits,
        draft_logits,
        drafts,
        is_sampled if kinds == "mixed" else None,
        temperature,
        max_path=6,
    )
    lengths = result.num_emitted.tolist()
    assert lengths[len(SHAPES)] == lengths[-1] == 0 and min(lengths[: len(SHAPES)]) > 0
    assert max(lengths) > 2


@pytest.mark.parametrize("rule", EXACT)
def test_many_siblings(gpu_provider: str, rule: TreeRule) -> None:
    """Hostile drafts, so that most siblings are rejected: peaked (little of q is left) and flat."""
    case = batch([[-1, 0, 0]] * 12 + [[-1, 0, 0, 0]] * 4 + [SHAPES["star"]] * 10)
    logits, draft_logits = torch.randn(2, len(case.parents), 8)
    draft_logits = torch.cat([-logits[:36], 2 * draft_logits[36:] - logits[36:]])
    drafts = draw_drafts(case, draft_logits, torch.ones(len(logits)))
    check_equals_reference(rule, case, logits, draft_logits, drafts)


@pytest.mark.parametrize("rule", RULES)
def test_deterministic_trees_need_no_draft_logits(gpu_provider: str, rule: TreeRule) -> None:
    case = batch([SHAPES["binary"], SHAPES["star"], SHAPES["late_child"]])
    logits = 2 * torch.randn(len(case.parents), 6)
    nothing = torch.zeros(len(logits), dtype=torch.bool)
    drafts = draw_drafts(case, logits, nothing)
    without = check_equals_reference(rule, case, logits, None, drafts)
    with_unused = run(rule, case, logits, torch.full_like(logits, torch.nan), drafts, nothing)
    assert [t.tolist() for t in without] == [t.tolist() for t in with_unused]


@pytest.mark.parametrize("length", [63, 65])
@pytest.mark.parametrize("rule", EXACT)
def test_identical_draft_and_target_accept_everything(
    gpu_provider: str, rule: TreeRule, length: int
) -> None:
    case = batch([list(range(-1, length - 1)), [-1, 0, 0, 1, 1]])
    logits = torch.randn(len(case.parents), 5)
    drafts = draw_drafts(case, logits, torch.ones(len(logits)))
    result = run(rule, case, logits, logits.clone(), drafts)
    assert result.num_emitted.tolist() == [length, 3]
    assert result.path[0].tolist() == list(range(length))


@pytest.mark.parametrize("rule", EXACT)
def test_greedy_and_undrafted_equal_tree_verify(gpu_provider: str, rule: TreeRule) -> None:
    """At temperature 0 the rules follow the argmax; a bare root gets plain decoding's token."""
    case = batch([SHAPES["binary"], SHAPES["star"], *[[-1]] * 6])
    num_rows = len(case.parents)
    logits = torch.randint(-2, 3, (num_rows, 5)).float()
    draft_logits = torch.randn(num_rows, 5)
    drafts = draw_drafts(case, logits, torch.zeros(num_rows))
    temperature = torch.cat([torch.zeros(num_rows - 6), torch.ones(6)])
    result = run(rule, case, logits, draft_logits, drafts, temperature=temperature)
    matched, _ = tree_verify(
        logits,
        drafts,
        case.parents,
        case.cu_num_rows,
        temperature,
        case.seeds,
        case.positions,
        max_rows=case.max_rows,
    )
    assert [t.tolist() for t in result] == [t.tolist() for t in matched]
    assert result.num_emitted[0] == 3


@pytest.mark.parametrize("rule", RULES)
def test_special_values(gpu_provider: str, rule: TreeRule) -> None:
    nan, inf = torch.nan, torch.inf
    target = torch.tensor(
        [[nan, 3.0, 1.0], [nan] * 3, [-inf] * 3, [0.0, inf, inf], [-inf, 0.0, 1.0], [0.0, 0.0, 0.0]]
    )
    draft = torch.tensor(
        [[0.0, 3.0, 1.0], [0.0] * 3, [0.0] * 3, [0.0, inf, 0.0], [9.0, -inf, 0.0], [nan, 0.0, 0.0]]
    )
    case = batch([[-1, 0, 0]] * 12)
    drafts = torch.tensor([-1, 1, 2] * 12)
    logits = target.repeat_interleave(3, 0).repeat(2, 1)
    draft_logits = draft.repeat_interleave(3, 0).repeat(2, 1)
    temperature = torch.cat([torch.ones(18), torch.zeros(18)])
    result = check_equals_reference(
        rule, case, logits, draft_logits, drafts, temperature=temperature
    )
    tokens, lengths = result.tokens[:, 0].tolist(), result.num_emitted.tolist()
    assert lengths[:2] == lengths[6:8] == [1, 1]  # a NaN in the target: no child
    assert tokens[1] == tokens[2] == tokens[7] == tokens[8] == 0 and tokens[6] == 1
    assert set(tokens[3:5]) <= {1, 2} and tokens[9:11] == [1, 2]
    if rule != "typical":
        assert lengths[5] == 1 and tokens[11] == 0  # a NaN in the draft; greedy does not read it


@pytest.mark.parametrize("rule", EXACT)
def test_wide_vocabulary(gpu_provider: str, rule: TreeRule) -> None:
    """A pass over a row in blocks, elders in different blocks, a peaked draft."""
    vocab_size = 151_936
    case = batch([[-1, 0, 0, 0]])
    logits = torch.randn(4, vocab_size)
    draft_logits = torch.randn(4, vocab_size)
    drafts = torch.tensor([-1, 5, 150_000, 70_000])
    draft_logits[0, drafts[1:]] = torch.tensor([22.0, 12.0, 9.0])
    result = check_equals_reference(rule, case, logits, draft_logits, drafts)
    assert result.num_emitted[0] == 1


def test_typical_takes_the_longest_likely_path(gpu_provider: str) -> None:
    case = batch([SHAPES["late_child"]] * 4)
    num_rows = len(case.parents)
    logits = 2 * torch.randn(num_rows, 4)
    drafts = draw_drafts(case, logits, torch.ones(num_rows))
    epsilon, delta = 0.3, 0.9
    result = run("typical", case, logits, None, drafts, epsilon=epsilon, delta=delta)
    probs = logits.double().softmax(1)
    entropy = -(probs * probs.log()).sum(1)
    for req, start in enumerate(case.starts[:-1]):
        tree, paths = SHAPES["late_child"], [[0]]
        for node in range(1, len(tree)):
            parent = start + tree[node]
            threshold = min(epsilon, delta * float(torch.exp(-entropy[parent])))
            if probs[parent, drafts[start + node]] > threshold:
                paths += [[*path, node] for path in paths if path[-1] == tree[node]]
        longest = max(map(len, paths))
        # Depth first the smaller row comes first at the first difference.
        best = min(path for path in paths if len(path) == longest)
        assert result.path[req].tolist() == best + [-1] * (case.max_rows - longest)


@pytest.mark.slow
@pytest.mark.parametrize("rule", EXACT)
@pytest.mark.parametrize("draft", ["friendly", "hostile", "identical"])
def test_keyed_noise_follows_the_target(rule: TreeRule, draft: str) -> None:
    requests, parents = 2500, [-1, 0, 0, 1, 1]
    case = batch([parents] * requests)
    target = torch.tensor([1.0, 0.0, -1.0, 2.0, -torch.inf, 0.5])
    q = {"friendly": target + 0.3 * torch.randn(6), "hostile": -target, "identical": target}[draft]
    q = torch.nan_to_num(q, 0.0, 3.0, -torch.inf)
    rows = len(parents) * requests
    logits, draft_logits = target.expand(rows, -1), q.expand(rows, -1)
    drafts = torch.full((requests, len(parents)), -1)
    drafts[:, 1:3] = torch.multinomial(q.softmax(0).expand(requests, -1), 2)
    drafts[:, 3:] = torch.multinomial(q.softmax(0).expand(requests, -1), 2)
    with dispatch.force("reference"):
        result = run(rule, case, logits, draft_logits, drafts.view(-1))
    check_positions(result.tokens[:, :3], target.double().softmax(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(rule="greedy"), "rule is 'greedy'"),
        (dict(draft_logits=None, is_sampled=torch.ones(3, dtype=torch.bool)), "need draft_logits"),
        (dict(draft_logits=torch.zeros(3, 4)), "shape of logits"),
        (dict(is_sampled=torch.ones(3)), "is_sampled"),
        (dict(parents=torch.tensor([-1, 2, 0])), "row 1 has parent 2"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    index = torch.zeros(3, dtype=torch.int64)
    good: dict[str, Any] = dict(
        rule="recursive",
        logits=torch.zeros(3, 5),
        draft_logits=torch.zeros(3, 5),
        draft_tokens=index,
        parents=torch.tensor([-1, 0, 0]),
        cu_num_rows=torch.tensor([0, 3], dtype=torch.int32),
        is_sampled=None,
        temperature=torch.zeros(3),
        seeds=index,
        positions=index,
        max_rows=3,
    )
    tree_rejection(**good)
    with pytest.raises(ValueError, match=message):
        tree_rejection(**good | change)
