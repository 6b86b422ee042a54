"""int8_linear: a linear layer whose weights are int8, with one scale per row.

A layer over few inputs takes as long as reading its weights, so half the bytes of bfloat16 are half
the time. Rows are scaled as in Dettmers et al. 2022, arXiv 2208.07339, but inputs keep 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from specplus_kernels import dispatch
from specplus_kernels.int8_linear import cpu, reference

__all__ = ["Int8Weight", "int8_linear"]

LANES, DEPTH, OFFSET = 16, 4, 128


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """A matrix [num_out, num_in], in panels of 16 rows in which 4 neighbours of each lie together.

    panels: uint8 [ceil(num_out / 16), ceil(num_in / 4), 16, 4]: the int8 values plus 128. scales:
    float32, one per row of all panels.
    """

    panels: torch.Tensor
    scales: torch.Tensor
    num_out: int
    num_in: int

    @classmethod
    def of(cls, weight: torch.Tensor) -> Int8Weight:
        """The nearest to `weight`, symmetric around 0. weight: [num_out, num_in], any float."""
        (num_out, num_in), weight = weight.shape, weight.float()
        padding = (0, -num_in % DEPTH, 0, -num_out % LANES)
        scales = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        rows = functional.pad((weight / scales[:, None]).round() + OFFSET, padding, value=OFFSET)
        panels = rows.to(torch.uint8).unflatten(1, (-1, DEPTH)).unflatten(0, (-1, LANES))
        panels = panels.transpose(1, 2).contiguous()
        return cls(panels, functional.pad(scales, padding[2:]).contiguous(), num_out, num_in)

    def dense(self) -> torch.Tensor:
        """float32 [num_out, num_in]."""
        rows = self.panels.transpose(1, 2).flatten(2).flatten(0, 1).float() - OFFSET
        return (rows * self.scales[:, None])[: self.num_out, : self.num_in]


def int8_linear(x: torch.Tensor, weight: Int8Weight) -> torch.Tensor:
    """Returns x @ weight.T, float32 [num_rows, num_out].

    Args:
        x: [num_rows, num_in] bf16, fp16 or fp32; the kernel rounds a row to 16 bits of its largest.
            Of a row that is not finite, no output is.
        weight: of num_in columns.

    Raises:
        ValueError: the shapes do not fit.

    """
    if x.dim() != 2 or x.shape[1] != weight.num_in:
        raise ValueError(f"x {tuple(x.shape)} must be [num_rows, num_in={weight.num_in}]")
    which = dispatch.provider(x.device)
    if which == "cpu" and (reason := cpu.refuses(weight)):
        which = dispatch.downgrade("int8_linear", reason)
    return (cpu if which == "cpu" else reference).int8_linear(x, weight)
