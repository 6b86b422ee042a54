"""row_commit in plain torch: gather all rows of a tensor, then scatter them."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def row_commit(
    tensors: Sequence[torch.Tensor], src_rows: torch.Tensor, dst_rows: torch.Tensor
) -> None:
    """See the package's docstring."""
    real = (src_rows >= 0) & (dst_rows >= 0)
    src, dst = src_rows[real], dst_rows[real]
    for tensor in tensors:
        tensor[dst] = tensor[src]
