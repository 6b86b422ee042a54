"""rejection: chains of seven sampled nodes by both rules; the draft resembles the target.

Expected of an H100 by arithmetic, not measured: of a request's eight rows seven are read, p and q,
and for the bonus token one more row of p (and of q after a rejection), at 3.0 TB/s

    rows      32,000 bf16    151,936 bf16    262,144 bf16    151,936 fp32 and bf16
       8          0.3 us          1.6 us          2.8 us          2.4 us
      64          2.6 us         13.0 us         22.4 us         18.6 us
     256         10.2 us         51.9 us         89.5 us         73.7 us
     512         20.5 us        103.7 us        179.0 us        147.5 us

and about 15 us more for six launches. Block reads a rejected row again on one SM, about 15 to 20
us a row of 152k; the requests do so side by side, a request rejects at most seven times. At 256
rows of 152k standard is expected at 67 us (77 % of the bandwidth; 87 % at 512 rows).

The peer is standard rejection over padded chains as torch ops on probabilities, compiled, with the
same coins and noise, so its tokens are the same. vLLM's kernels draw other coins and are not
comparable token by token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from specplus_kernels.rejection import ChainRule, rejection
from specplus_kernels.sampling import noise

from benchmarks import harness

LENGTH = 8  # rows of a request
RULES: tuple[ChainRule, ...] = ("standard", "block")


def run_gpu(benchmark: harness.Benchmark) -> None:
    """All sizes."""
    for vocab_size in (32_000, 151_936, 262_144):
        for rows in (8, 64, 256, 512):
            _case(benchmark, "standard", rows, vocab_size, torch.bfloat16)
    for rule in RULES:
        _case(benchmark, rule, 256, 151_936, torch.float32)
    _case(benchmark, "block", 256, 151_936, torch.bfloat16)


def _case(
    benchmark: harness.Benchmark, rule: ChainRule, rows: int, vocab_size: int, dtype: torch.dtype
) -> None:
    num_reqs = rows // LENGTH
    with torch.device("cuda"):
        base = 3 * torch.randn(rows, vocab_size)
        logits = base.to(dtype)
        draft_logits = (base + 0.7 * torch.randn_like(base)).bfloat16()
        drafts = torch.multinomial(draft_logits.float().softmax(1), 1).flatten().roll(1)
        starts = torch.arange(num_reqs + 1, dtype=torch.int32) * LENGTH
        seeds, positions = torch.arange(rows) // LENGTH, torch.arange(rows)
        temperature = torch.ones(rows)
    del base

    def ours() -> torch.Tensor:
        arguments = (logits, draft_logits, drafts, starts, None, temperature, seeds, positions)
        return rejection(rule, *arguments, max_rows=LENGTH).tokens

    peers = {}
    if rule == "standard" and rows == 256:
        arguments = (logits, draft_logits, drafts, seeds, positions)
        peers["torch.compile"] = lambda: _compiled()(*arguments)
    element = logits.element_size()
    read = (rows - num_reqs) * (element + 2) + num_reqs * element
    benchmark.case(
        f"{rule} {rows} x {vocab_size} {str(dtype)[6:]}", ours, peers, num_bytes=read * vocab_size
    )


@cache
def _compiled() -> Callable[..., torch.Tensor]:
    return torch.compile(_standard)


def _standard(
    logits: torch.Tensor,
    draft_logits: torch.Tensor,
    drafts: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Standard rejection of chains of equal length, [num_reqs, LENGTH] tokens."""
    rows = torch.arange(len(drafts), device=drafts.device)
    local = torch.arange(LENGTH, device=drafts.device)
    p, q = logits.float().softmax(1), draft_logits.float().softmax(1)
    x = drafts.roll(-1)
    root = rows - rows % LENGTH
    coins = noise.coin(seeds, positions[root], rows % LENGTH + 1)
    accepted = (coins * q[rows, x] < p[rows, x]).view(-1, LENGTH)[:, :-1].long().cumprod(1).sum(1)
    last = torch.arange(0, len(drafts), LENGTH, device=drafts.device) + accepted
    taken = torch.where((accepted < LENGTH - 1)[:, None], q[last], 0.0)
    residual = (p[last] - taken).clamp(min=0.0).log()
    vocabulary = torch.arange(logits.shape[1], device=drafts.device)
    noised = residual + noise.gumbel(seeds[last, None], positions[last, None], vocabulary)
    tokens = torch.where(local < accepted[:, None], x.view(-1, LENGTH), -1)
    return torch.where(local == accepted[:, None], noised.argmax(1)[:, None], tokens)


if __name__ == "__main__":
    harness.main(None, "rejection", __doc__, run_gpu=run_gpu)
