"""What holds for every proposer, whatever it drafts: checked beside a target made of a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from tests.proposers.models import give_model, hidden_state
from vllm_specplus.config import METHODS, SpecPlusConfig
from vllm_specplus.core.growth import Candidates, Path
from vllm_specplus.proposers.base import DraftRequest, Proposer
from vllm_specplus.proposers.registry import PROPOSERS, create

Target = Callable[[Sequence[int]], int]
"""The token that follows a sequence."""
ALL_METHODS = sorted(PROPOSERS)
PROMPT = [7, 3, 7, 1, 3, 7]


def mixing(tokens: Sequence[int]) -> int:
    """Depends on the last two tokens and falls into a loop of many."""
    return (5 * tokens[-1] + 3 * tokens[-2] + 1) % 11


def make(method: str, **options: object) -> Proposer:
    shape = {} if "lookahead" in method else {"num_speculative_tokens": 4, "tree": "dynamic:12"}
    path = "random" if any(METHODS[name].model != "none" for name in method.split("+")) else ""
    about = {"speculative_model": f"[{method}]{path}"} | shape | options
    return give_model(create(SpecPlusConfig.from_options(about)))


@dataclass
class Decoding:
    """One request beside a target; `step` is a round, and `emitted` what each has emitted.

    num_absorbed: positions whose hidden states the proposer has.
    """

    proposer: Proposer
    target: Target
    tokens: list[int] = field(default_factory=lambda: list(PROMPT))
    req_id: str = "r"
    emitted: list[list[int]] = field(default_factory=list)
    num_absorbed: int = 0

    def request(self, **bounds: object) -> DraftRequest:
        config, token_ids = self.proposer.config, np.array(self.tokens, np.int32)
        num_slots = len(self.tokens) + config.num_nodes
        whole = DraftRequest(
            self.req_id,
            token_ids,
            config.num_speculative_tokens,
            config.num_nodes,
            num_slots=num_slots,
        )
        return replace(whole, **bounds)  # type: ignore[arg-type]

    def absorb(self) -> None:
        """Hands over the hidden states of what has been committed: all but the root's."""
        start, self.num_absorbed = self.num_absorbed, len(self.tokens) - 1
        states = [hidden_state(self.tokens[: end + 1]) for end in range(start, self.num_absorbed)]
        self.proposer.absorb(self.req_id, start, torch.stack(states))

    def step(self, num_nodes: int | None = None, **bounds: object) -> Candidates:
        """Drafts, verifies the first `num_nodes` and tells the proposer."""
        self.absorb()
        request = self.request(**bounds)
        [candidates] = self.proposer.propose([request])
        check(candidates, request)
        tree = candidates.tree(len(candidates) if num_nodes is None else num_nodes)
        paths: list[Path] = [(), *candidates.paths()[: len(tree)]]
        row_tokens = [self.target([*self.tokens, *path]) for path in paths]
        accepted = [0]
        for row, path in enumerate(paths[1:], start=1):
            if tree.parents[row - 1] == accepted[-1] and path[-1] == row_tokens[accepted[-1]]:
                accepted.append(row)
        self.emitted.append([row_tokens[row] for row in accepted])
        self.tokens += self.emitted[-1]
        self.proposer.observe(self.req_id, tree, accepted[1:], row_tokens)
        return candidates

    @property
    def tokens_per_round(self) -> float:
        return sum(map(len, self.emitted)) / len(self.emitted)


def check(candidates: Candidates, request: DraftRequest) -> None:
    """Candidates are a tree, best first, and within the request's bounds."""
    tree = candidates.tree(len(candidates))
    tree.validate()
    assert len(tree) <= request.max_nodes and max(tree.depths()) <= request.max_depth
    assert all(request.min_prob <= prob <= 1 for prob in candidates.probs)
    assert list(candidates.probs) == sorted(candidates.probs, reverse=True)


def check_proposer(make_one: Callable[[], Proposer]) -> None:
    """All that a proposer must keep: bounds, cuts, repeatability, requests apart and forgotten."""
    first, second, cut = (Decoding(make_one(), mixing) for _ in range(3))
    for number in range(40):
        assert first.step() == second.step()
        cut.step(
            num_nodes=number % 3,
            max_depth=number % 4,
            max_nodes=number % 7,
            min_prob=0.1 * (number % 3),
            chain_only=number % 5 == 0,
        )
    check_apart(make_one)


def check_apart(make_one: Callable[[], Proposer]) -> None:
    """A request drafts alike beside others in any order, and nothing is left of one that was
    forgotten."""
    nothing = {"max_nodes": 0, "max_depth": 0}  # after which nothing is left to be learned
    bounds_of_steps: list[dict[str, int]] = [{}] * 5 + [nothing]
    found = []
    for order in (slice(None), slice(None, None, -1)):
        shared = make_one()
        requests = [Decoding(shared, mixing, [*PROMPT, 5, n], req_id=str(n)) for n in range(3)]
        for bounds in bounds_of_steps:
            for decoding in requests:
                decoding.step(**bounds)
        pair = requests[:2][order]
        for decoding in pair:
            decoding.absorb()
        found.append(shared.propose([decoding.request() for decoding in pair])[order])
        for name in ("0", "1", "2", "never seen"):
            shared.forget(name)
        assert not getattr(shared, "_requests", None)
    assert found[0] == found[1]
