"""int8_linear in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from specplus_kernels.int8_linear import Int8Weight


def int8_linear(x: torch.Tensor, weight: Int8Weight) -> torch.Tensor:
    """See the package's docstring."""
    return x.float() @ weight.dense().T
