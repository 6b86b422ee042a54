"""Ops as single nodes of torch.compile's graphs, which their launchers would break.

Only ops that models call inside their forward pass need this; eager calls do not pass through
torch's dispatcher.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Op = TypeVar("Op", bound=Callable[..., torch.Tensor])


def opaque(op: Op) -> Op:
    """Registers `op`, which writes its argument `out` and returns it, as `torch.ops.specplus.*`."""

    signature = inspect.signature(op, eval_str=True)
    # torch takes no tensors by keyword alone.
    positional = [
        parameter.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
        for parameter in signature.parameters.values()
    ]

    def run(*args: Any, **kwargs: Any) -> None:
        named = dict(zip(signature.parameters, args, strict=False))
        op(**named, **kwargs)

    run.__signature__ = inspect.Signature(positional, return_annotation=None)  # type: ignore[attr-defined]
    registered = torch.library.custom_op(f"specplus::{op.__name__}", run, mutates_args=("out",))
    registered.register_fake(lambda *args, **kwargs: None)

    @functools.wraps(op)
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            return op(*args, **kwargs)
        registered(*args, **kwargs)
        return signature.bind(*args, **kwargs).arguments["out"]

    return call  # type: ignore[return-value]
