"""tree_rejection: trees of eight rows, three children at the root, by each rule.

Expected of an H100 by arithmetic, not measured. Four of a tree's eight rows have children: p and q
of these are read once (typical: p alone), then the last row of the path, at 3.0 TB/s

    rows      32,000 bf16    151,936 bf16    262,144 bf16
       8          0.2 us          0.9 us          1.6 us
      64          1.5 us          7.3 us         12.6 us
     256          6.1 us         29.2 us         50.3 us
     512         12.3 us         58.3 us        100.7 us

and about 15 us more for six launches. Where a rejected child has a younger sibling, or in traversal
a parent that is not certain, the walk reads the parent's p and q again on one SM: 15 to 20 us a
pass over 152k, requests side by side. Recursive makes up to 3 passes here and traversal up to 6, so
at 152k the walk, not the bandwidth, is expected to decide: 30 to 120 us.

There is no peer: no library at hand verifies sampled trees on a GPU, and the torch reference, which
walks in Python, cannot be compiled.
"""

from __future__ import annotations

import torch
from specplus_kernels.tree_rejection import TreeRule, tree_rejection

from benchmarks import harness

TREE = [-1, 0, 0, 0, 1, 1, 2, 4]
NUM_PARENTS = 4
RULES: tuple[TreeRule, ...] = ("recursive", "traversal", "typical")


def run_gpu(benchmark: harness.Benchmark) -> None:
    """All sizes."""
    for rule in RULES:
        for vocab_size in (32_000, 151_936, 262_144):
            for rows in (8, 64, 256, 512):
                _case(benchmark, rule, rows, vocab_size)


def _case(benchmark: harness.Benchmark, rule: TreeRule, rows: int, vocab_size: int) -> None:
    num_reqs = rows // len(TREE)
    with torch.device("cuda"):
        base = 3 * torch.randn(rows, vocab_size)
        logits = base.bfloat16()
        draft_logits = (base + 0.7 * torch.randn_like(base)).bfloat16()
        drafts = _drafts(draft_logits)
        parents = torch.tensor(TREE * num_reqs)
        starts = torch.arange(num_reqs + 1, dtype=torch.int32) * len(TREE)
        seeds, positions = torch.arange(rows) // len(TREE), torch.arange(rows)
        temperature = torch.ones(rows)
    del base

    def ours() -> torch.Tensor:
        tree = (draft_logits, drafts, parents, starts, None, temperature, seeds, positions)
        return tree_rejection(rule, logits, *tree, max_rows=len(TREE), max_path=3).tokens

    reads = NUM_PARENTS * (1 if rule == "typical" else 2) + 1
    benchmark.case(
        f"{rule} {rows} x {vocab_size} bf16", ours, num_bytes=reads * num_reqs * vocab_size * 2
    )


def _drafts(draft_logits: torch.Tensor) -> torch.Tensor:
    """The children of each row, drawn without replacement."""
    drafts = torch.full((len(draft_logits),), -1)
    drawn = torch.multinomial(draft_logits.float().softmax(1), 3).view(-1, len(TREE), 3)
    tokens = drafts.view(-1, len(TREE))
    for node, parent in enumerate(TREE[1:], 1):
        tokens[:, node] = drawn[:, parent, TREE[1:node].count(parent)]
    return drafts


if __name__ == "__main__":
    harness.main(None, "tree_rejection", __doc__, run_gpu=run_gpu)
