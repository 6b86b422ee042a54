"""Rule `match` under sampling: what is emitted follows the target's distribution.

A Markov target over four tokens, so the exact distribution of every position is a matrix power.
20,000 sequences are decoded in rounds of trees; friendly drafts are the likely tokens, adversarial
ones the unlikely, random ones anything. Pairs of neighbours are tested too, since a rule can bias
the bonus token and yet keep every marginal.

Sabotages that these tests were seen to catch: accepting the first child without asking (kept below
as a control), and matching a node against its own row's target instead of its parent's.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from vllm_specplus.core.tree import Tree, TreeBatch
from vllm_specplus.core.verify import match

NUM_SEQUENCES = 20_000
NUM_POSITIONS = 5
TARGET = np.array(
    [[0.7, 0.2, 0.1, 0.0], [0.1, 0.1, 0.1, 0.7], [0.25, 0.25, 0.25, 0.25], [0.02, 0.9, 0.04, 0.04]]
)
LEVEL = 1e-4  # of 30 p-values; the seeds are fixed, so a pass stays a pass
SHAPES = {"chain": [0, 1, 2], "star": [0, 0, 0], "tree": [0, 0, 1, 1, 2, 3]}


def draft(last: int, parents: list[int], ranking: np.ndarray) -> Tree:
    """Children take the tokens of `ranking[parent's token]` in turn."""
    tokens, num_children = [last], [0]
    for parent in parents:
        tokens.append(int(ranking[tokens[parent], num_children[parent]]))
        num_children[parent] += 1
        num_children.append(0)
    return Tree(tokens[1:], parents)


def decode(parents: list[int], ranking: np.ndarray, lie: bool, seed: int = 0) -> np.ndarray:
    """All sequences, in rounds of drafting, drawing a target per row, matching: int [num, len]."""
    rng = np.random.default_rng(seed)
    memo = [draft(last, parents, ranking) for last in range(len(TARGET))]
    sequences: list[list[int]] = [[0] for _ in range(NUM_SEQUENCES)]
    while short := [s for s in sequences if len(s) <= NUM_POSITIONS]:
        batch = TreeBatch.from_trees([memo[sequence[-1]] for sequence in short])
        rows = batch.tokens.numpy().copy()
        rows[:, 0] = [sequence[-1] for sequence in short]
        cumulative = TARGET[rows].cumsum(-1)
        targets = (rng.random(rows.shape)[..., None] > cumulative).sum(-1).clip(max=3)
        if lie:
            targets[:, 0] = rows[:, 1]
        accepted = match(batch, torch.from_numpy(targets)).numpy()
        for sequence, target, on_path in zip(short, targets, accepted, strict=True):
            sequence += target[on_path].tolist()
    return np.array([sequence[1 : NUM_POSITIONS + 1] for sequence in sequences])


def p_values(sequences: np.ndarray) -> list[float]:
    """Of every position's tokens and every pair of neighbours."""
    values = []
    marginal = np.eye(4)[0]
    for position in range(NUM_POSITIONS):
        before, marginal = marginal, marginal @ TARGET
        values.append(_p_value(sequences[:, position], marginal))
        if position:
            pairs = sequences[:, position - 1] * 4 + sequences[:, position]
            values.append(_p_value(pairs, (before[:, None] * TARGET).ravel()))
    return values


def _p_value(drawn: np.ndarray, probs: np.ndarray) -> float:
    counts = np.bincount(drawn, minlength=len(probs))
    possible = probs > 0
    if counts[~possible].any():
        return 0.0
    return chisquare(counts[possible], probs[possible] * len(drawn)).pvalue


def rankings() -> dict[str, np.ndarray]:
    friendly = np.argsort(-TARGET, axis=1, kind="stable")
    shuffled = np.random.default_rng(3).permuted(friendly, axis=1)
    return {"friendly": friendly, "adversarial": friendly[:, ::-1], "random": shuffled}


@pytest.mark.parametrize("drafts", ["friendly", "adversarial", "random"])
@pytest.mark.parametrize("shape", SHAPES)
def test_emitted_tokens_follow_the_target(shape: str, drafts: str) -> None:
    assert min(p_values(decode(SHAPES[shape], rankings()[drafts], lie=False))) > LEVEL


@pytest.mark.parametrize("drafts", ["friendly", "random"])
def test_a_liar_is_caught(drafts: str) -> None:
    sequences = decode(SHAPES["tree"], rankings()[drafts], lie=True)
    assert min(p_values(sequences)) < LEVEL
