"""tree_verify: tokens bit for bit as vLLM's V2 sampler draws them, the walk, special values.

Seen to fail: the noise of position + 1, seeds cut to 32 bits, blocks skipped with a headroom of 1,
the last maximum instead of the first, NaN rows that match, the last of equal siblings, padding rows
left unwritten, tokens counted from the block's start, a wrong term in the noise's series.
"""

from __future__ import annotations

import importlib.util
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from specplus_kernels.sampling import noise
from specplus_kernels.tree_verify import tree_verify

from tests.kernels import verify_case
from tests.kernels.verify_case import SHAPES, Batch, batch, check_counts, murmur3

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# log, log1p and the series differ by some units in the last place of numbers up to 23.
GUMBEL_ATOL = 1e-5


def run(case: Batch, logits: torch.Tensor, drafts: torch.Tensor, temperature: float) -> Any:
    temperatures = torch.full((len(drafts),), temperature)
    return tree_verify(
        logits,
        drafts,
        case.parents,
        case.cu_num_rows,
        temperatures,
        case.seeds,
        case.positions,
        max_rows=case.max_rows,
    )


def walk(drafts: list[int], parents: list[int], wanted: list[int]) -> list[int]:
    """Brute force: rows from the root, each the wanted child of the one above."""
    path = [0] if drafts else []
    while path:
        below = [
            row
            for row in range(1, len(drafts))
            if parents[row] == path[-1] and drafts[row] == wanted[path[-1]]
        ]
        if not below:
            break
        path.append(below[0])
    return path


def check_walk(case: Batch, drafts: torch.Tensor, target: torch.Tensor, result: Any) -> None:
    for req, (start, end) in enumerate(zip(case.starts, case.starts[1:], strict=False)):
        wanted = target[start:end].tolist()
        path = walk(drafts[start:end].tolist(), case.parents[start:end].tolist(), wanted)
        pad = [-1] * (case.max_rows - len(path))
        assert result.path[req].tolist() == path + pad
        assert result.tokens[req].tolist() == [wanted[row] for row in path] + pad
        assert result.num_emitted[req] == len(path)


def test_noise_is_murmur3() -> None:
    rng = random.Random(0)
    for domain in (0, noise.ACCEPT):
        for _ in range(50):
            seed = rng.getrandbits(64) - (1 << 63)
            position, token = rng.getrandbits(40), rng.getrandbits(20)
            seeds, positions, tokens = map(torch.tensor, (seed, position, token))
            ours = noise.hash32(seeds, positions, tokens, domain)
            assert ours == murmur3(seed, position, token, domain)
    tokens = torch.arange(5000)
    expected = [
        -math.log(-math.log1p(-(murmur3(11, 5, token, 0) + 0.5) * 2.0**-32))
        for token in range(5000)
    ]
    ours = noise.gumbel(torch.tensor(11), torch.tensor(5), tokens)
    torch.testing.assert_close(
        ours.double(), torch.tensor(expected).double(), atol=GUMBEL_ATOL, rtol=0
    )


def test_noise_decides_close_calls(gpu_provider: str) -> None:
    """Two tokens whose scores differ by the margin alone, one way and the other."""
    case, margin = batch([[-1]] * 60), 10 * GUMBEL_ATOL
    u = [
        [(murmur3(*key, token, 0) + 0.5) * 2.0**-32 for token in range(2)]
        for key in zip(case.seeds.tolist(), case.positions.tolist(), strict=True)
    ]
    noises = -torch.log(-torch.log1p(-torch.tensor(u, dtype=torch.float64)))
    wanted = torch.arange(60) % 2
    logits = torch.zeros(60, 2)
    logits[:, 1] = noises[:, 0] - noises[:, 1] + margin * (2 * wanted - 1)
    _, target = run(case, logits, torch.full((60,), -1), 1.0)
    assert target.tolist() == wanted.tolist()


def stock_gumbel_sample(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's kernel on this Triton, which the rest of vLLM refuses without a GPU."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        pytest.skip("vLLM is not installed")
    triton = pytest.importorskip("triton")
    path = Path(found.origin).parent / "v1/worker/gpu/sample/gumbel.py"
    if not path.exists():
        pytest.skip("this vLLM has no V2 sampler")
    language = importlib.import_module("triton.language")
    stub = SimpleNamespace(triton=triton, tl=language)
    monkeypatch.setitem(sys.modules, "vllm.triton_utils", stub)
    spec = importlib.util.spec_from_file_location("stock_gumbel", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.gumbel_sample


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_equals_vllm(
    gpu_provider: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = stock_gumbel_sample(monkeypatch)
    case = batch([SHAPES["chain"], SHAPES["one"], SHAPES["star"]])
    num_rows = len(case.parents)
    logits = 4 * torch.randn(num_rows, 5000)
    expected = sample(
        logits,
        torch.arange(num_rows, dtype=torch.int32),
        torch.full((num_rows,), temperature),
        case.seeds,
        case.positions,
        apply_temperature=False,
        is_drafting=False,
    )
    _, target = run(case, logits, torch.full((num_rows,), -1), temperature)
    assert target.tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_and_walks(gpu_provider: str, dtype: torch.dtype, temperature: float) -> None:
    rng = random.Random(3)
    trees = [*SHAPES.values(), [], verify_case.random_tree(17, rng), []]
    case = batch(trees, padding=3)
    num_rows, vocab_size = len(case.parents), 5
    wide = torch.randn(num_rows, 2 * vocab_size + 1).to(dtype)
    logits = wide[:, 3 : 3 + vocab_size]
    drafts = torch.randint(-1, vocab_size, (num_rows,))
    result, target = run(case, logits, drafts, temperature)
    for row in range(case.starts[-1]):
        scores = logits[row].double()
        if temperature:
            u = [
                (murmur3(int(case.seeds[row]), int(case.positions[row]), token, 0) + 0.5) * 2.0**-32
                for token in range(vocab_size)
            ]
            scores = scores - torch.log(-torch.log1p(-torch.tensor(u, dtype=torch.float64)))
        assert target[row] == scores.argmax()
    assert target[case.starts[-1] :].tolist() == [-1] * 3
    check_walk(case, drafts, target, result)


@pytest.mark.parametrize("num_rows", [63, 65])
def test_long_chains_match_to_the_end(gpu_provider: str, num_rows: int) -> None:
    case = batch([list(range(-1, num_rows - 1)), [-1]])
    logits = torch.randn(num_rows + 1, 7)
    drafts = torch.cat([torch.tensor([-1]), logits.argmax(1)[: num_rows - 1], torch.tensor([-1])])
    for parents in (case.parents, None):
        result, target = tree_verify(
            logits,
            drafts,
            parents,
            case.cu_num_rows,
            torch.zeros(num_rows + 1),
            case.seeds,
            case.positions,
            max_rows=num_rows,
        )
        check_walk(case, drafts, target, result)
        assert result.num_emitted.tolist() == [num_rows, 1]


def test_wide_vocabulary_and_ties(gpu_provider: str) -> None:
    vocab_size = 151_936
    case = batch([[-1]] * 3)
    logits = torch.full((3, vocab_size), -30.0)
    logits[0, vocab_size - 1] = 2.0
    logits[1, [40_000, 41_500, 100_000]] = 2.0  # two blocks of a split, another split
    logits[2] = torch.randn(vocab_size)
    temperature = torch.tensor([0.0, 0.0, 1.0])
    _, target = tree_verify(
        logits,
        torch.full((3,), -1),
        None,
        case.cu_num_rows,
        temperature,
        case.seeds,
        case.positions,
        max_rows=1,
    )
    scores = logits[2] + noise.gumbel(case.seeds[2], case.positions[2], torch.arange(vocab_size))
    assert target.tolist() == [vocab_size - 1, 40_000, int(scores.argmax())]


def test_special_values(gpu_provider: str) -> None:
    nan, inf = torch.nan, torch.inf
    logits = torch.tensor(
        [[nan, nan, 1.0], [-inf] * 3, [0.0, inf, inf], [nan] * 3, [nan, -inf, 0.0]]
    )
    case = batch([[-1, 0]] * 5)
    rows = logits.repeat_interleave(2, 0)
    for temperature in (0.0, 1.0):
        drafts = torch.tensor([-1, 2, -1, 0, -1, 1, -1, 0, -1, 2])
        result, target = run(case, rows, drafts, temperature)
        assert target[::2].tolist() == [2, 0, 1, 0, 2]
        assert result.num_emitted.tolist() == [1, 2, 2, 1, 1]  # a row with a NaN matches nothing


def test_placeholders_never_match(gpu_provider: str) -> None:
    case = batch([SHAPES["chain"]])
    logits = torch.zeros(5, 4)
    drafts = torch.tensor([0, 0, -1, 0, 0])
    result, _ = run(case, logits, drafts, 0.0)
    assert result.path.tolist() == [[0, 1, -1, -1, -1]]


def test_first_of_equal_siblings(gpu_provider: str) -> None:
    result, _ = run(batch([SHAPES["star"]]), torch.zeros(5, 4), torch.tensor([9, 3, 0, 0, 0]), 0.0)
    assert result.path[0].tolist() == [0, 2, -1, -1, -1]


def test_every_emitted_position_follows_the_target() -> None:
    """Friendly and hostile drafts alike: a chain of two nodes, chi-square at each position."""
    requests, vocab_size = 10_000, 6
    case = batch([[-1, 0, 1]] * requests)
    one = torch.tensor([[0.0, 1.0, -1.0, 2.0, -torch.inf, 0.5]]).repeat(3, 1)
    one[1] = one[1].flip(0)
    probs = one.double().softmax(1)
    for draft in ([-1, 3, 2], [-1, 4, 4], [-1, 0, 0]):
        drafts = torch.tensor(draft).repeat(requests)
        result, _ = run(case, one.repeat(requests, 1), drafts, 1.0)
        for step in range(2):
            emitted = result.tokens[:, step]
            counts = torch.bincount(emitted[emitted >= 0], minlength=vocab_size)
            seen = probs[step] > 0
            assert counts[~seen].sum() == 0
            if counts.sum():
                check_counts(counts[seen], probs[step][seen])


def test_no_requests(gpu_provider: str) -> None:
    case = batch([])
    result, target = run(case, torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), 1.0)
    assert result.tokens.shape == (0, 1) and target.shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(logits=torch.zeros(2, 5)), "logits"),
        (dict(logits=torch.zeros(3, 5).double()), "logits must be bf16"),
        (dict(seeds=torch.zeros(3)), "seeds"),
        (dict(temperature=torch.zeros(6)[::2]), "temperature"),
        (dict(parents=torch.tensor([-1, 1, 0])), "row 1 has parent 1"),
        (dict(max_rows=2), "max_rows allows 2"),
        (dict(max_path=0), "depth 1"),
        (dict(max_path=3), "max_path is 3"),
        (dict(cu_num_rows=torch.tensor([0, 3])), "int32"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = dict(
        logits=torch.zeros(3, 5),
        draft_tokens=torch.zeros(3, dtype=torch.int64),
        parents=torch.tensor([-1, 0, 0]),
        cu_num_rows=torch.tensor([0, 3], dtype=torch.int32),
        temperature=torch.zeros(3),
        seeds=torch.zeros(3, dtype=torch.int64),
        positions=torch.zeros(3, dtype=torch.int64),
        max_rows=3,
    )
    tree_verify(**good)
    with pytest.raises(ValueError, match=message):
        tree_verify(**good | change)
