"""row_argmax in plain torch."""

from __future__ import annotations

import torch


def row_argmax(logits: torch.Tensor) -> torch.Tensor:
    """See the package's docstring. torch lets NaN win, hence the replacement."""
    return torch.argmax(logits.float().nan_to_num(-torch.inf, torch.inf, -torch.inf), dim=-1)
