"""Batches of token trees and independent oracles for the verification ops' tests."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from specplus_kernels.tree_rejection.reference import Tree

Walk = Callable[[Tree], tuple[int, torch.Tensor]]

SHAPES: dict[str, list[int]] = {  # parents of each request's rows
    "one": [-1],
    "chain": [-1, 0, 1, 2, 3],
    "star": [-1, 0, 0, 0, 0],
    "binary": [-1, 0, 0, 1, 1, 2, 2],
    "late_child": [-1, 0, 0, 0, 2, 4, 1, 4],
}


def random_tree(num_rows: int, rng: random.Random) -> list[int]:
    return [-1, *(rng.randrange(row) for row in range(1, num_rows))][:num_rows]


@dataclass(frozen=True, slots=True)
class Batch:
    """The index half of a batch: its rows, seeds and positions."""

    parents: torch.Tensor  # [num_rows]
    cu_num_rows: torch.Tensor  # [num_reqs + 1]
    seeds: torch.Tensor  # [num_rows]
    positions: torch.Tensor  # [num_rows], the root's plus the depth
    max_rows: int

    @property
    def starts(self) -> list[int]:
        return self.cu_num_rows.tolist()


def batch(trees: list[list[int]], padding: int = 0, seed: int = 7) -> Batch:
    """One request per list of parents, then `padding` rows."""
    rng, parents, seeds, positions, starts = random.Random(seed), [], [], [], [0]
    for tree in trees:
        request_seed, root = rng.getrandbits(63) * rng.choice([-1, 1]), rng.randrange(1 << 33)
        depths: list[int] = []
        for parent in tree:
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        parents += tree
        seeds += [request_seed] * len(tree)
        positions += [root + depth for depth in depths]
        starts.append(len(parents))
    pad = [1 << 60] * padding
    return Batch(
        torch.tensor(parents + pad, dtype=torch.int64),
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor(seeds + pad, dtype=torch.int64),
        torch.tensor(positions + pad, dtype=torch.int64),
        max((len(tree) for tree in trees), default=1) or 1,
    )


def murmur3(seed: int, position: int, token: int, domain: int) -> int:
    """MurmurHash3_x86_32 (Appleby, public domain) of 16 bytes, in Python's integers."""
    word = 0xFFFFFFFF
    data = (seed & (1 << 64) - 1).to_bytes(8, "little")
    data += (position & word).to_bytes(4, "little") + token.to_bytes(4, "little")
    state = domain
    for i in range(0, 16, 4):
        key = int.from_bytes(data[i : i + 4], "little") * 0xCC9E2D51 & word
        key = (key << 15 | key >> 17) & word
        state ^= key * 0x1B873593 & word
        state = (state << 13 | state >> 19) & word
        state = state * 5 + 0xE6546B64 & word
    state ^= 16
    state = (state ^ state >> 16) * 0x85EBCA6B & word
    state = (state ^ state >> 13) * 0xC2B2AE35 & word
    return state ^ state >> 16


def draw_drafts(case: Batch, draft_logits: torch.Tensor, is_sampled: torch.Tensor) -> torch.Tensor:
    """Tokens of all nodes: siblings in turn, sampled without replacement or any other token."""
    drafts = torch.full((len(case.parents),), -1)
    probs = draft_logits.double().softmax(1)
    vocab_size = probs.shape[1]
    for start, end in pairwise(case.starts):
        for node in range(start + 1, end):
            parent = start + int(case.parents[node])
            rest = probs[parent].clone()
            siblings = case.parents[start + 1 : node] == case.parents[node]
            rest[drafts[start + 1 : node][siblings]] = 0.0
            drafts[node] = torch.multinomial(rest, 1) if is_sampled[node] else rest.argmax()
    assert int(drafts.max()) < vocab_size
    return drafts


def check_counts(counts: torch.Tensor, probs: torch.Tensor) -> None:
    """Pearson's chi-square; fails one time in a thousand on a right sample (the seed is fixed)."""
    expected = probs * counts.sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.full_like(statistic, len(counts) - 1)
    assert torch.special.gammaincc(freedom / 2, statistic / 2) > 1e-3


def check_positions(tokens: torch.Tensor, probs: torch.Tensor) -> None:
    """Chi-square of every position against `probs`, the target's in any context.

    What was not emitted is drawn from the target: whether a position is emitted may depend on what
    it holds, what stands there in the end may not.
    """
    drawn = torch.multinomial(probs, tokens.numel(), replacement=True).view(tokens.shape)
    completed = torch.where(tokens < 0, drawn, tokens)
    seen = probs > 0
    for position in completed.T:
        counts = torch.bincount(position, minlength=len(probs))
        assert counts[~seen].sum() == 0
        check_counts(counts[seen], probs[seen].double())


class Coins:
    """Answers `coin * a < b` by script and multiplies up the probability of its answers."""

    def __init__(self, script: list[bool], scale: float = 1.0) -> None:
        self.script, self.scale, self.asked, self.prob = script, scale, 0, 1.0

    def __getitem__(self, node: int) -> Coins:
        self.scale = 1.0
        return self

    def __mul__(self, scale: torch.Tensor) -> Coins:
        self.scale = float(scale)
        return self

    def __lt__(self, bound: torch.Tensor) -> bool:
        if self.asked == len(self.script):
            self.script.append(True)
        yes = self.script[self.asked]
        chance = min(float(bound) / self.scale, 1.0) if self.scale else float(bound > 0)
        self.asked += 1
        self.prob *= chance if yes else 1.0 - chance
        return yes


class World:
    """A target and a draft over a tiny vocabulary whose distributions depend on all tokens before.

    `joint` and `mean_path` run a rule of a reference over every draw of a tree and every answer of
    its coins, so what they return is exact.
    """

    def __init__(self, vocab_size: int, depth: int, spread: float = 1.5) -> None:
        self.vocab_size, self.depth = vocab_size, depth
        contexts = [c for d in range(depth + 2) for c in product(range(vocab_size), repeat=d)]
        self.p = {c: self._distribution(spread) for c in contexts}
        self.q = {c: self._distribution(spread) for c in contexts}

    def _distribution(self, spread: float) -> torch.Tensor:
        return (spread * torch.randn(self.vocab_size, dtype=torch.float64)).softmax(0)

    def plain(self, context: tuple[int, ...], length: int) -> torch.Tensor:
        """The target's joint distribution of `length` tokens after `context`."""
        if not length:
            return torch.ones((), dtype=torch.float64)
        below = [self.plain((*context, x), length - 1) for x in range(self.vocab_size)]
        return torch.stack([self.p[context][x] * below[x] for x in range(self.vocab_size)])

    def joint(self, walk: Walk, parents: list[int], is_sampled: list[bool]) -> torch.Tensor:
        """The distribution of the first depth + 1 tokens: those emitted, then the target's."""
        total = torch.zeros([self.vocab_size] * (self.depth + 1), dtype=torch.float64)
        for prob, path, measure in self._outcomes(walk, parents, is_sampled):
            after = self.depth - len(path)
            below = [self.plain((*path, x), after) for x in range(self.vocab_size)]
            bonus = measure / measure.sum()
            total[path] += prob * torch.stack([b * t for b, t in zip(bonus, below, strict=True)])
        return total

    def mean_path(self, walk: Walk, parents: list[int], is_sampled: list[bool]) -> float:
        """The expected number of accepted nodes."""
        outcomes = self._outcomes(walk, parents, is_sampled)
        return sum(prob * len(path) for prob, path, _ in outcomes)

    def _outcomes(
        self, walk: Walk, parents: list[int], is_sampled: list[bool]
    ) -> Iterator[tuple[float, tuple[int, ...], torch.Tensor]]:
        for prob, tokens in self._draws(parents, is_sampled, [-1]):
            contexts = [self._context(parents, tokens, row) for row in range(len(tokens))]
            children = [
                [c for c in range(len(tokens)) if parents[c] == r] for r in range(len(tokens))
            ]
            script: list[bool] = []
            while True:
                coins = Coins(script)
                tree = Tree(
                    torch.stack([self.p[c] for c in contexts]),
                    torch.stack([self.q[c] for c in contexts]),
                    tokens,
                    parents,
                    children,
                    is_sampled,
                    coins,  # type: ignore[arg-type]
                )
                node, measure = walk(tree)
                if coins.prob > 0.0:
                    yield prob * coins.prob, contexts[node], measure
                while script and not script[-1]:
                    script.pop()
                if not script:
                    break
                script[-1] = False

    def _draws(
        self, parents: list[int], is_sampled: list[bool], tokens: list[int]
    ) -> Iterator[tuple[float, list[int]]]:
        """All tokens of a tree with their probabilities; a deterministic one is the likeliest."""
        node = len(tokens)
        if node == len(parents):
            yield 1.0, tokens
            return
        rest = self.q[self._context(parents, tokens, parents[node])].clone()
        rest[[tokens[s] for s in range(1, node) if parents[s] == parents[node]]] = 0.0
        rest /= rest.sum()
        options = range(self.vocab_size) if is_sampled[node] else [int(rest.argmax())]
        for token in options:
            prob = float(rest[token]) if is_sampled[node] else 1.0
            if prob > 0.0:
                for below, all_tokens in self._draws(parents, is_sampled, [*tokens, token]):
                    yield prob * below, all_tokens

    @staticmethod
    def _context(parents: list[int], tokens: list[int], row: int) -> tuple[int, ...]:
        context: tuple[int, ...] = ()
        while row > 0:
            context, row = (tokens[row], *context), parents[row]
        return context
