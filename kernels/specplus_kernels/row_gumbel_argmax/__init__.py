"""row_gumbel_argmax: samples one token a row by the Gumbel-max trick with keyed noise.

    token = argmax_i ( logits[i] / temperature - log(-log u_i) ),  the division in fp32, the rest
    in double;  u_i = (bits_i + 1/2) / 2^53,  bits_i = splitmix64(key, i + 1) >> 11

The token is distributed as softmax(logits / temperature) (Gumbel 1954; Maddison et al. 2014, arXiv
1411.0030). u_i depends on the row's seed and the token alone: key = mix(seed) and splitmix64(key,
n) = mix(key + n * 0x9e3779b97f4a7c15) with SplitMix64's mix (Steele, Lea and Flood 2014). This is
the noise of `fused_gumbel_argmax` in vLLM 0.32, so the token equals that op's on
`logits.float() / temperature`; other versions of vLLM draw otherwise, compare before relying on it.

The first of equals wins, NaN counts as -inf, a row of nothing but -inf gives 0. At temperature 0
the token is the argmax.
"""

from __future__ import annotations

import torch

from specplus_kernels import dispatch
from specplus_kernels.row_gumbel_argmax import cpu, reference

__all__ = ["row_gumbel_argmax"]


def row_gumbel_argmax(
    logits: torch.Tensor, temperature: torch.Tensor, seeds: torch.Tensor
) -> torch.Tensor:
    """Returns the sampled token of every row, [num_rows] int64.

    Args:
        logits: [num_rows, vocab_size] bf16, fp16 or fp32; rows may be apart by any stride.
        temperature: [num_rows] fp32, not negative.
        seeds: [num_rows] int64, any bits.

    Raises:
        ValueError: a shape or dtype does not fit.

    """
    if logits.dim() != 2 or not logits.shape[1]:
        raise ValueError(f"logits {tuple(logits.shape)} must be [num_rows, vocab_size >= 1]")
    wanted = {"temperature": (temperature, torch.float32), "seeds": (seeds, torch.int64)}
    for name, (tensor, dtype) in wanted.items():
        if tensor.shape != logits.shape[:1] or tensor.dtype != dtype:
            raise ValueError(
                f"{name} must be [{logits.shape[0]}] {dtype}, got {tuple(tensor.shape)} "
                f"{tensor.dtype}"
            )
    which = dispatch.provider(logits.device)
    if which == "cpu" and (reason := cpu.refuses(logits)):
        which = dispatch.downgrade("row_gumbel_argmax", reason)
    run = cpu.row_gumbel_argmax if which == "cpu" else reference.row_gumbel_argmax
    return run(logits, temperature, seeds)
