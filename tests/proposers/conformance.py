"""What holds for every proposer, whatever it drafts: checked beside a target made of a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch.nn import functional

from tests.proposers.levels_model import FunctionModel
from vllm_specplus.config import METHODS, SpecPlusConfig
from vllm_specplus.core.growth import Candidates, Path
from vllm_specplus.proposers.base import DraftRequest, Proposer
from vllm_specplus.proposers.by_level import LevelProposer
from vllm_specplus.proposers.heads.medusa import MedusaHeads
from vllm_specplus.proposers.heads.medusa_checkpoint import MedusaConfig
from vllm_specplus.proposers.levels import HiddenStates
from vllm_specplus.proposers.medusa import MedusaProposer
from vllm_specplus.proposers.merged import MergedProposer, by_levels
from vllm_specplus.proposers.registry import PROPOSERS, create

Target = Callable[[Sequence[int]], int]
"""The token that follows a sequence."""
BY_LEVELS = sorted(
    name for name, cls in PROPOSERS.items() if cls in (LevelProposer, MergedProposer)
)
AT_ONCE = sorted(PROPOSERS.keys() - set(BY_LEVELS))
PROMPT = [7, 3, 7, 1, 3, 7]


def mixing(tokens: Sequence[int]) -> int:
    """Depends on the last two tokens and falls into a loop of many."""
    return (5 * tokens[-1] + 3 * tokens[-2] + 1) % 11


def make(method: str, **options: object) -> Proposer:
    shape = {} if "lookahead" in method else {"num_speculative_tokens": 4, "tree": "dynamic:12"}
    path = "x" if any(METHODS[name].model != "none" for name in method.split("+")) else ""
    text = "[draft]x+[draft]y" if method == "draft+draft" else f"[{method}]{path}"
    config = SpecPlusConfig.from_options({"speculative_model": text} | shape | options)
    proposer = create(config)
    for part in by_levels(proposer):
        reads: HiddenStates = None if part.drafter.name == "draft" else "previous"
        part.model = FunctionModel(mixing, config.num_speculative_tokens, reads)
    if isinstance(proposer, MedusaProposer):
        proposer.model, proposer.num_heads = random_medusa(), 3
    return proposer


def random_medusa() -> MedusaHeads:
    """Three heads over 16 tokens; a hidden state is a token."""
    about = MedusaConfig(num_heads=3, num_layers=1, hidden_size=1, vocab_size=16, has_bias=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        heads = MedusaHeads(about).requires_grad_(False)
        heads.shared = partial(functional.linear, weight=torch.randn(16, 1))
    return heads


@dataclass
class Decoding:
    """One request beside a target; `step` is a round, and `emitted` what each has emitted."""

    proposer: Proposer
    target: Target
    tokens: list[int] = field(default_factory=lambda: list(PROMPT))
    req_id: str = "r"
    index: int = 0
    absorbed: int = 0
    emitted: list[list[int]] = field(default_factory=list)

    def request(self, **bounds: object) -> DraftRequest:
        """Hands over the hidden states of what was committed, which are its tokens."""
        states = torch.tensor(self.tokens[self.absorbed : -1]).float()[:, None]
        self.proposer.absorb(self.req_id, self.absorbed, states)
        self.absorbed += len(states)
        config, token_ids = self.proposer.config, np.array(self.tokens, np.int32)
        whole = DraftRequest(
            self.req_id,
            token_ids,
            config.num_speculative_tokens,
            config.num_nodes,
            index=self.index,
            num_slots=len(self.tokens) + config.num_nodes,
        )
        return replace(whole, **bounds)  # type: ignore[arg-type]

    def step(self, num_nodes: int | None = None, **bounds: object) -> Candidates:
        """Drafts, verifies the first `num_nodes` and tells the proposer."""
        request = self.request(**bounds)
        [candidates] = self.proposer.propose([request])
        check(candidates, request)
        tree = candidates.tree(len(candidates) if num_nodes is None else num_nodes)
        self.proposer.granted([candidates.prefix(len(tree))])
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
    check_steps(make_one)
    check_apart(make_one)


def check_steps(make_one: Callable[[], Proposer]) -> Decoding:
    """Bounds, cuts and repeatability; returns a request that was drafted for without bounds."""
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
    return first


def check_apart(make_one: Callable[[], Proposer]) -> None:
    """A request drafts alike beside others, and nothing is left of one that was forgotten."""
    shared = make_one()
    requests = [Decoding(shared, mixing, [*PROMPT, 5, n], req_id=str(n)) for n in range(3)]
    for _ in range(5):
        for decoding in requests:
            decoding.step()
    pair = [decoding.request() for decoding in requests[:2]]
    shared.propose(pair)  # what it learns from the last step is learned now
    assert shared.propose(pair) == shared.propose(pair[::-1])[::-1]
    for name in ("0", "1", "2", "never seen"):
        shared.forget(name)
    assert not getattr(shared, "_requests", None)
