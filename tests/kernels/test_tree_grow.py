"""tree_grow: expand against float64 by definition, rerank against a heap, both against core.growth.

Seen to fail: a lane not read again after it gave its best, or read in another part, the sums of all
parts but one left out, ties to the larger index, the parent's score left out, NaN let win, d2t left
out, the row stride of another tensor, one doubling too few, a row in both words of the mask, the
mask of padding kept, min_score exclusive, parents one row too high; in the reference: ties to the
last candidate, padding with a depth, the root's children below the first candidate.
"""

from __future__ import annotations

import heapq
from itertools import count
from math import exp, inf, isnan, log

import pytest
import torch
from specplus_kernels.tree_grow import expand, rerank

from tests.kernels.tree_case import Tree, assert_rows

SCORE_TOLERANCE = 1e-5  # fp32 sums of up to 152k exponentials, and scores of magnitude up to 50
FLOOR, CEILING = -3e38, torch.finfo(torch.float32).max


class Candidates:
    """The buffers that `expand` fills, poisoned; every row of them is longer than it need be."""

    def __init__(self, num_reqs: int, num: int) -> None:
        self.tokens = torch.empty(num_reqs, num + 3, dtype=torch.int64)[:, :num]
        self.parents = torch.empty(num_reqs, num + 5, dtype=torch.int64)[:, :num]
        self.scores = torch.empty(num_reqs, num + 1)[:, :num]
        self.filled = 0

    def expand(
        self, logits: torch.Tensor, frontier: torch.Tensor, k: int, next_width: int, **kwargs
    ) -> torch.Tensor:
        buffers = self.tokens, self.parents, self.scores
        following = expand(
            logits, frontier, *buffers, start=self.filled, k=k, next_width=next_width, **kwargs
        )
        self.filled += frontier.shape[1] * k
        return following

    def level(self, start: int) -> list[list[tuple[int, int, float]]]:
        """Token, parent and score of the candidates from `start`, by request."""
        columns = (x[:, start : self.filled].tolist() for x in (self.tokens, self.parents))
        scores = self.scores[:, start : self.filled].tolist()
        return [list(zip(*row, strict=True)) for row in zip(*columns, scores, strict=True)]


def children_of(logits: list[float], k: int) -> list[tuple[int, float]]:
    """The k best tokens and their log-probabilities, by definition; (0, -inf) where there is none.

    Python's floats are float64.
    """
    clean = [-inf if isnan(x) or x < FLOOR else min(x, CEILING) for x in logits]
    best = sorted((token for token, x in enumerate(clean) if x > -inf), key=lambda t: -clean[t])
    highest = max(clean)
    total = sum(exp(x - highest) for x in clean) if best else 0.0
    chosen = [(token, clean[token] - highest - log(total)) for token in best[:k]]
    return chosen + [(0, -inf)] * (k - len(chosen))


def check_level(
    candidates: Candidates, start: int, logits: torch.Tensor, frontier: torch.Tensor, k: int
) -> None:
    rows = iter(logits.double().tolist())
    above = candidates.scores.tolist()
    for req, found in enumerate(candidates.level(start)):
        expected = [
            (token, parent, (above[req][parent] if parent >= 0 else 0.0) + logprob)
            for parent in frontier[req].tolist()
            for token, logprob in children_of(next(rows), k)
        ]
        expected = [(0 if score == -inf else token, p, score) for token, p, score in expected]
        assert [child[:2] for child in found] == [child[:2] for child in expected]
        scores = torch.tensor([[child[2] for child in side] for side in (found, expected)])
        torch.testing.assert_close(*scores, atol=SCORE_TOLERANCE, rtol=SCORE_TOLERANCE)


def check_frontier(candidates: Candidates, start: int, frontier: torch.Tensor) -> None:
    for found, children in zip(frontier.tolist(), candidates.level(start), strict=True):
        order = sorted(range(len(children)), key=lambda i: (-children[i][2], i))
        assert found == [start + i for i in order[: len(found)]]


def two_levels(
    num_reqs: int, vocab_size: int, width: int, k: int, dtype: torch.dtype = torch.float32
) -> None:
    """The root's children, then theirs; the first level has as many as the second is wide."""
    candidates = Candidates(num_reqs, width + width * k)
    root = torch.full((num_reqs, 1), -1)
    logits = (torch.randn(num_reqs, vocab_size) * 4).to(dtype)
    frontier = candidates.expand(logits, root, width, width)
    check_level(candidates, 0, logits, root, width)
    check_frontier(candidates, 0, frontier)
    logits = (torch.randn(num_reqs * width, vocab_size) * 4).to(dtype)
    following = candidates.expand(logits, frontier, k, min(width, 5))
    check_level(candidates, width, logits, frontier, k)
    check_frontier(candidates, width, following)


@pytest.mark.parametrize(
    ("num_reqs", "vocab_size", "width", "k"),
    [(1, 7, 1, 1), (3, 100, 4, 3), (2, 4097, 3, 5), (1, 9000, 2, 16), (2, 600, 16, 16)],
)
def test_expand(gpu_provider: str, num_reqs: int, vocab_size: int, width: int, k: int) -> None:
    two_levels(num_reqs, vocab_size, width, k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_expand_with_ties_of_short_floats(gpu_provider: str, dtype: torch.dtype) -> None:
    two_levels(2, 3000, 3, 8, dtype)


def test_many_tiles_in_one_part(gpu_provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the rows alone fill a GPU: each is one part."""
    if gpu_provider == "triton":
        monkeypatch.setattr("specplus_kernels.tree_grow.kernel.PROGRAMS", 1)
    candidates, root = Candidates(3, 4), torch.full((3, 1), -1)
    logits = torch.randn(3, 9500)
    logits[1, 9400], logits[1, 9400 - 1024], logits[1, 9400 - 8192] = 9.0, 8.0, 7.0  # one lane
    logits[2] = torch.arange(9500) / 500  # the running maximum always rises
    frontier = candidates.expand(logits, root, 4, 2)
    check_level(candidates, 0, logits, root, 4)
    check_frontier(candidates, 0, frontier)


def test_wide_vocabulary(gpu_provider: str) -> None:
    logits, root = torch.randn(2, 151_936).bfloat16() * 3, torch.full((2, 1), -1)
    logits[1, 5 + 1024 * torch.arange(6)] = torch.arange(20.0, 26.0).bfloat16()  # all of one lane
    candidates = Candidates(2, 8)
    candidates.expand(logits, root, 8, 8)
    check_level(candidates, 0, logits, root, 8)


def test_equal_logits_go_to_the_first_token(gpu_provider: str) -> None:
    candidates, root = Candidates(1, 4), torch.full((1, 1), -1)
    logits = torch.zeros(1, 5000)
    logits[0, ::2] = -0.0
    frontier = candidates.expand(logits, root, 4, 4)
    assert candidates.tokens.tolist() == [[0, 1, 2, 3]]
    assert frontier.tolist() == [[0, 1, 2, 3]]


def test_non_finite_logits_and_dead_branches(gpu_provider: str) -> None:
    candidates, root = Candidates(1, 3 + 9), torch.full((1, 1), -1)
    logits = torch.full((1, 1500), -inf)
    logits[0, 3], logits[0, 1200], logits[0, 70] = 1.0, 2.0, torch.nan
    frontier = candidates.expand(logits, root, 3, 3)
    check_level(candidates, 0, logits, root, 3)
    assert candidates.tokens[0, :3].tolist() == [1200, 3, 0]
    assert candidates.scores[0, 2].item() == -inf
    logits = torch.randn(3, 1500)
    logits[0], logits[1, 9], logits[1, 40] = torch.nan, inf, inf
    logits[2, 1:] = torch.finfo(torch.bfloat16).min
    following = candidates.expand(logits, frontier, 3, 9)
    check_level(candidates, 3, logits, frontier, 3)
    check_frontier(candidates, 3, following)
    assert candidates.tokens[0, 6:8].tolist() == [9, 40]
    rows = rerank(candidates.tokens, candidates.parents, candidates.scores, num_nodes=12)
    assert rows.num_nodes.tolist() == [5]  # 1200, 3, and after 3 two infinite and a finite one
    assert rows.tokens[0, :5].tolist() == [-1, 1200, 3, 9, 40]


def test_vocabulary_smaller_than_k(gpu_provider: str) -> None:
    candidates, root = Candidates(2, 5), torch.full((2, 1), -1)
    logits = torch.randn(2, 3)
    frontier = candidates.expand(logits, root, 5, 5)
    check_level(candidates, 0, logits, root, 5)
    check_frontier(candidates, 0, frontier)


@pytest.mark.parametrize("transposed", [False, True])
def test_strided_logits(gpu_provider: str, transposed: bool) -> None:
    candidates, root = Candidates(4, 3), torch.full((4, 1), -1)
    logits = torch.randn(5000, 9).T[1:8:2] if transposed else torch.randn(4, 6001)[:, 7:5020]
    candidates.expand(logits, root, 3, 1)
    check_level(candidates, 0, logits, root, 3)


def test_reduced_draft_vocabulary(gpu_provider: str) -> None:
    plain, mapped, root = Candidates(2, 4), Candidates(2, 4), torch.full((2, 1), -1)
    logits, d2t = torch.randn(2, 500), torch.randperm(100_000)[:500]
    plain.expand(logits, root, 4, 2)
    mapped.expand(logits, root, 4, 2, d2t=d2t)
    assert torch.equal(mapped.tokens, d2t[plain.tokens])
    assert torch.equal(mapped.scores, plain.scores)


def test_no_requests(gpu_provider: str) -> None:
    candidates = Candidates(0, 4)
    frontier = candidates.expand(torch.randn(0, 9), torch.full((0, 1), -1), 4, 2)
    assert frontier.shape == (0, 2)
    rows = rerank(candidates.tokens, candidates.parents, candidates.scores, num_nodes=3)
    assert rows.tokens.shape == (0, 4)


def best_first(
    tokens: list[int], parents: list[int], scores: list[float], most: int, least: float = -inf
) -> Tree:
    """Pops the best candidate whose parent has been popped, the first of equals."""
    below: dict[int, list[int]] = {}
    for child, parent in enumerate(parents):
        below.setdefault(parent, []).append(child)
    chosen: list[int] = []
    heap = [(-scores[child], child) for child in below.get(-1, [])]
    heapq.heapify(heap)
    while heap and len(chosen) < most:
        score, node = heapq.heappop(heap)
        if -score < least or -score == -inf:
            break
        chosen.append(node)
        for child in below.get(node, []):
            heapq.heappush(heap, (-scores[child], child))
    row_of = {node: row for row, node in enumerate(chosen, start=1)} | {-1: 0}
    return Tree([tokens[node] for node in chosen], [row_of[parents[node]] for node in chosen])


def random_candidates(num_reqs: int, num: int, chain: bool = False) -> list[torch.Tensor]:
    """Scores in coarse steps, so that many tie, parents with children among them."""
    parents = torch.full((num_reqs, num), -1)
    scores = torch.zeros(num_reqs, num)
    for req in range(num_reqs):
        for node in range(num):
            parent = node - 1 if chain else int(torch.randint(-1, node, ()) if node else -1)
            above = scores[req, parent].item() if parent >= 0 else 0.0
            parents[req, node] = parent
            scores[req, node] = above - 0.5 * int(torch.randint(0, 3, ()))
    return [torch.arange(100, 100 + num).expand(num_reqs, num).contiguous(), parents, scores]


@pytest.mark.parametrize("chain", [False, True])
@pytest.mark.parametrize("num_nodes", [0, 1, 2, 17, 63, 64, 127])
def test_rerank(gpu_provider: str, num_nodes: int, chain: bool) -> None:
    tokens, parents, scores = random_candidates(2, 140, chain)
    scores[1, 5:] = -inf  # a request of few candidates
    rows = rerank(tokens, parents, scores, num_nodes=num_nodes)
    lists = zip(tokens.tolist(), parents.tolist(), scores.tolist(), strict=True)
    assert_rows(rows, [best_first(*request, num_nodes) for request in lists], num_nodes)


@pytest.mark.parametrize("num", [1, 30, 65])
def test_fewer_candidates_than_nodes(gpu_provider: str, num: int) -> None:
    tokens, parents, scores = random_candidates(3, num)
    scores[2] = -inf
    rows = rerank(tokens, parents, scores, num_nodes=70)
    lists = zip(tokens.tolist(), parents.tolist(), scores.tolist(), strict=True)
    assert_rows(rows, [best_first(*request, 70) for request in lists], 70)


def test_min_score(gpu_provider: str) -> None:
    tokens, parents, scores = random_candidates(3, 50)
    rows = rerank(tokens, parents, scores, num_nodes=40, min_score=-1.0)
    lists = zip(tokens.tolist(), parents.tolist(), scores.tolist(), strict=True)
    assert_rows(rows, [best_first(*request, 40, -1.0) for request in lists], 40)
    assert rows.num_nodes.min() > 0 and rows.num_nodes.max() < 40


@pytest.mark.parametrize(("k", "depth"), [(4, 2), (3, 3), (2, 4)])
def test_wide_frontiers_are_best_first_growth(gpu_provider: str, k: int, depth: int) -> None:
    """Where every candidate is expanded, expand and rerank equal core.growth.grow."""
    grow = pytest.importorskip("vllm_specplus.core.growth").grow
    vocab_size, num_nodes = 50, 12
    logits: dict[tuple[int, ...], torch.Tensor] = {}

    def children(path: tuple[int, ...]) -> list[tuple[int, float]]:
        values = logits.setdefault(path, torch.randn(vocab_size) * 3).tolist()
        return children_of(values, k)

    grown = grow(children, num_nodes, depth).tree(num_nodes)
    candidates, frontier = Candidates(1, sum(k**d for d in range(1, depth + 1))), None
    paths: dict[int, tuple[int, ...]] = {-1: ()}
    for level in range(1, depth + 1):
        frontier = torch.full((1, 1), -1) if frontier is None else frontier
        above = [paths[node] for node in frontier[0].tolist()]
        level_logits = [logits.setdefault(p, torch.randn(vocab_size) * 3) for p in above]
        start = candidates.filled
        frontier = candidates.expand(torch.stack(level_logits), frontier, k, k**level)
        for node, (token, parent, _) in zip(count(start), candidates.level(start)[0], strict=False):
            paths[node] = (*paths[parent], token)
    rows = rerank(candidates.tokens, candidates.parents, candidates.scores, num_nodes=num_nodes)
    assert_rows(rows, [Tree(list(grown.tokens), list(grown.parents))], num_nodes)


def test_errors(gpu_provider: str) -> None:
    candidates, root = Candidates(2, 8), torch.full((2, 1), -1)
    logits = torch.randn(2, 30)
    with pytest.raises(ValueError, match="num_reqs \\* width"):
        candidates.expand(logits[:1], root, 4, 2)
    with pytest.raises(ValueError, match="int64 and contiguous"):
        candidates.expand(logits, root.int(), 4, 2)
    with pytest.raises(ValueError, match="float64"):
        candidates.expand(logits.double(), root, 4, 2)
    with pytest.raises(ValueError, match="k 17"):
        candidates.expand(logits, root, 17, 2)
    with pytest.raises(ValueError, match="next_width 5"):
        candidates.expand(logits, root, 4, 5)
    with pytest.raises(ValueError, match="do not fit 8"):
        candidates.expand(logits, root, 9, 2)
    with pytest.raises(ValueError, match="d2t"):
        candidates.expand(logits, root, 4, 2, d2t=torch.zeros(29, dtype=torch.int64))
    tokens, parents, scores = random_candidates(2, 8)
    with pytest.raises(ValueError, match="float32"):
        rerank(tokens, parents, scores.double(), num_nodes=3)
    with pytest.raises(ValueError, match="must all be"):
        rerank(tokens, parents[:, :7], scores, num_nodes=3)
    with pytest.raises(ValueError, match="within a request"):
        rerank(tokens[:, ::2], parents[:, ::2], scores[:, ::2], num_nodes=3)
    with pytest.raises(ValueError, match="num_nodes 128"):
        rerank(tokens, parents, scores, num_nodes=128)
