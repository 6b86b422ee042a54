"""The tiny-vocabulary model's exact distribution, and proposers that know it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaForCausalLM

from tests.engine.models import TINY_VOCAB_SIZE
from vllm_specplus.config import SpecPlusConfig
from vllm_specplus.core.growth import Candidates
from vllm_specplus.proposers.base import DraftRequest, Proposer

PROMPT = (3, 7, 3, 5)


@torch.inference_mode()
def conditionals(path: Path, length: int) -> list[np.ndarray]:
    """p(next token | output so far) after 0 .. length - 1 output tokens, by the plain model in
    torch: float64, one axis of TINY_VOCAB_SIZE per output token and one for the next."""
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    outputs = list(itertools.product(range(TINY_VOCAB_SIZE), repeat=length - 1))
    token_ids = torch.tensor([[*PROMPT, *output] for output in outputs])
    probs = model(token_ids).logits[:, len(PROMPT) - 1 :].double().softmax(-1).numpy()
    tables = []
    for depth in range(length):
        stride = TINY_VOCAB_SIZE ** (length - 1 - depth)
        tables.append(probs[::stride, depth].reshape((TINY_VOCAB_SIZE,) * (depth + 1)))
    return tables


def joint(tables: Sequence[np.ndarray]) -> np.ndarray:
    """Probability of every output sequence: one axis per token."""
    probs = tables[0]
    for table in tables[1:]:
        probs = probs[..., None] * table
    return probs


class Ranked(Proposer):
    """Bushy trees of the most (or least) probable tokens: `width` children per node."""

    def __init__(
        self, config: SpecPlusConfig, tables: Sequence[np.ndarray], best: bool, width: int
    ) -> None:
        super().__init__(config)
        self.tables, self.best, self.width = tables, best, width

    def propose(self, requests: Sequence[DraftRequest]) -> list[Candidates]:
        cache: dict[tuple, Candidates] = {}
        result = []
        for request in requests:
            output = tuple(request.token_ids[len(PROMPT) :].tolist())
            key = (output, request.max_depth, request.max_nodes)
            if key not in cache:
                cache[key] = self._tree(*key)
            result.append(cache[key])
        return result

    def _tree(self, output: tuple[int, ...], max_depth: int, max_nodes: int) -> Candidates:
        tokens: list[int] = []
        parents: list[int] = []
        paths = [output]
        for row in itertools.count():
            if row == len(paths) or len(paths[row]) - len(output) == max_depth:
                break
            order = np.argsort(self.tables[len(paths[row])][paths[row]])
            order = order[::-1] if self.best else order
            for token in order[: self.width].tolist():
                if len(tokens) < max_nodes:
                    tokens.append(token)
                    parents.append(row)
                    paths.append((*paths[row], token))
        return Candidates(tokens, parents, [1 / (row + 2) for row in range(len(tokens))])
