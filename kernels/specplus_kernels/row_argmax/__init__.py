"""row_argmax: the token with the largest logit of every row.

The first maximum wins. NaN counts as -inf, so a row of NaN and -inf alone gives 0. On rows without
NaN this is torch.argmax, and vLLM's greedy_argmax on the row in fp32.
"""

from __future__ import annotations

import torch

from specplus_kernels import dispatch
from specplus_kernels.row_argmax import cpu, reference

__all__ = ["row_argmax"]


def row_argmax(logits: torch.Tensor) -> torch.Tensor:
    """Returns the argmax of every row, [num_rows] int64.

    Args:
        logits: [num_rows, vocab_size] bf16, fp16 or fp32; rows may be apart by any stride.

    Raises:
        ValueError: `logits` is not a matrix with at least one column.

    """
    if logits.dim() != 2 or not logits.shape[1]:
        raise ValueError(f"logits {tuple(logits.shape)} must be [num_rows, vocab_size >= 1]")
    which = dispatch.provider(logits.device)
    if which == "cpu" and (reason := cpu.refuses(logits)):
        which = dispatch.downgrade("row_argmax", reason)
    return cpu.row_argmax(logits) if which == "cpu" else reference.row_argmax(logits)
