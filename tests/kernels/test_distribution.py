"""What verification emits over a wide vocabulary follows the target, rule by rule.

The kernels on a GPU, with 20,000 requests over 32,000 tokens; elsewhere the references, which the
kernels equal, with fewer over 1,000. Tokens are
counted in bins of about equal probability. Seen to fail: the noise of one seed for all requests,
drafts drawn from another distribution than q.
"""

from __future__ import annotations

import pytest
import torch
from specplus_kernels import dispatch
from specplus_kernels.verify import Rule, verify

from tests.kernels.verify_case import batch, check_counts

ON_GPU = torch.cuda.is_available()
NUM_REQS, VOCAB_SIZE = (20_000, 32_000) if ON_GPU else (1_500, 1_000)
NUM_BINS = 20
CHAIN, TREE = [-1, 0, 1], [-1, 0, 0, 1]


def bins_of(probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bin of each token, and the probability of each bin."""
    middle = probs.cumsum(0) - probs / 2
    bins = (middle * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    return bins, torch.zeros(NUM_BINS, dtype=probs.dtype).index_add(0, bins, probs)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["match", "rejection", "block", "recursive", "traversal"])
@pytest.mark.parametrize("draft", ["friendly", "hostile"])
def test_wide_vocabulary(rule: Rule, draft: str) -> None:
    where: tuple[str, dispatch.Provider] = ("cuda", "triton") if ON_GPU else ("cpu", "reference")
    with torch.device(where[0]), dispatch.force(where[1]):
        parents = CHAIN if rule in ("rejection", "block") else TREE
        case = batch([parents] * NUM_REQS)
        target = torch.randn(VOCAB_SIZE)
        q = target + 0.5 * torch.randn(VOCAB_SIZE) if draft == "friendly" else -target
        rows = len(parents) * NUM_REQS
        # Siblings, rows 1 and 2 of TREE, without replacement; anything else on its own.
        drawn = torch.multinomial(q.softmax(0).expand(NUM_REQS, -1), 2)
        alone = torch.multinomial(q.softmax(0).expand(NUM_REQS, -1), 2, replacement=True)
        drafts = torch.cat([drawn[:, :1], alone if parents == CHAIN else drawn, alone[:, :1]], 1)
        drafts = drafts[:, : len(parents)].contiguous()
        sampled = rule != "match"
        result = verify(
            rule,
            target.expand(rows, -1),
            drafts.view(-1),
            case.cu_num_rows,
            torch.ones(rows),
            case.seeds,
            case.positions,
            max_rows=case.max_rows,
            parents=None if parents == CHAIN else case.parents,
            draft_logits=q.expand(rows, -1) if sampled else None,
        )
        probs = target.double().softmax(0)
        bins, chances = bins_of(probs)
        drawn = torch.multinomial(probs, result.tokens.numel(), replacement=True)
        # What was not emitted is drawn from the target: see check_positions.
        emitted = torch.where(result.tokens < 0, drawn.view(result.tokens.shape), result.tokens)
        for position in emitted[:, :2].T:
            check_counts(torch.bincount(bins[position], minlength=NUM_BINS), chances)
