"""Sampled output with speculation has the distribution of plain sampling.

Chi-square per position and per pair of neighbours against the exact probabilities of a model with
a vocabulary of 12, computed by torch alone. Seen to fail (p < 1e-5) where rows of all depths shared
one draw, where the first child was accepted outright in one tree of twenty, and where tree rows saw
their siblings.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from scipy.stats import chisquare
from vllm import SamplingParams

from tests.engine.distribution import PROMPT, Ranked, conditionals, joint
from tests.engine.engines import model_path, start

NUM_SEQUENCES = 20_480
LENGTH = 4
SMALLEST_P = 1e-4
"""28 tests of a fixed engine seed: a sound engine fails for one seed in 350, not now and then."""
TOP_K = 6
CASES = {
    "likely": (dict(best=True, width=3), {}),
    "unlikely": (dict(best=False, width=3), {}),
    "everything": (dict(best=True, width=12), {}),
    "likely_top_k": (dict(best=True, width=3), dict(top_k=TOP_K)),
}
"""What is drafted, and the sampling parameters beside temperature 1."""
OPTIONS = dict(
    skip_tokenizer_init=True, max_num_seqs=256, max_model_len=64, speculative_tree="dynamic:15"
)


@cache
def tables(top_k: int | None) -> list[np.ndarray]:
    """p(next token | output so far), as `conditionals` gives it, filtered."""
    exact = conditionals(model_path("tiny_vocab"), LENGTH)
    if top_k is None:
        return exact
    kept = [p * (p >= np.sort(p, axis=-1)[..., -top_k, None]) for p in exact]
    return [p / p.sum(-1, keepdims=True) for p in kept]


def sample(seed: int, draft: dict, sampling: dict) -> np.ndarray:
    """int [NUM_SEQUENCES, LENGTH], unseeded requests."""
    engine = start("tiny_vocab", "dynamic", seed=seed, **OPTIONS)
    spec_round = engine.llm.collective_rpc(lambda worker: worker.worker.model_runner.round)[0]
    spec_round.proposer = Ranked(spec_round.proposer.config, tables(None), **draft)
    params = SamplingParams(max_tokens=LENGTH, ignore_eos=True, detokenize=False, **sampling)
    prompt = {"prompt_token_ids": list(PROMPT)}
    outputs = engine.llm.generate([prompt] * NUM_SEQUENCES, params, use_tqdm=False)
    assert engine.probe.drafted > NUM_SEQUENCES
    assert engine.probe.accepted > NUM_SEQUENCES / 2 or not draft["best"]
    return np.array([output.outputs[0].token_ids for output in outputs])


def p_value(tokens: np.ndarray, probs: np.ndarray) -> float:
    """Chi-square of counts of token tuples against `probs`; rare cells are pooled.

    tokens: int [num, k]; probs: float [vocab] * k.
    """
    counts = np.zeros(probs.shape)
    np.add.at(counts, tuple(tokens.T), 1)
    expected = probs.ravel() * len(tokens)
    rare = expected < 5
    observed = np.append(counts.ravel()[~rare], counts.ravel()[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    return chisquare(observed[expected > 0], expected[expected > 0]).pvalue


def p_values(tokens: np.ndarray, probs: np.ndarray) -> dict[tuple[int, ...], float]:
    """One test per position and per pair of neighbouring positions.

    probs: of every sequence, [vocab] * LENGTH.
    """
    groups = [(i,) for i in range(LENGTH)] + [(i, i + 1) for i in range(LENGTH - 1)]
    return {
        kept: p_value(
            tokens[:, kept], probs.sum(tuple(axis for axis in range(LENGTH) if axis not in kept))
        )
        for kept in groups
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_distribution_is_that_of_plain_sampling(case):
    draft, sampling = CASES[case]
    tokens = sample(list(CASES).index(case), draft, sampling)
    values = p_values(tokens, joint(tables(sampling.get("top_k"))))
    assert min(values.values()) > SMALLEST_P, values
