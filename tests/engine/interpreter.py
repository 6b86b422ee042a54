"""Makes vLLM's V2 runner run on a CPU, in Triton's interpreter: import this module before vLLM.

The kernels are those that a GPU runs; docs/v2-matrix.md lists what the interpreter cannot run. A
process that vLLM spawns imports the main module of `python -m` again, and so this one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}

import tests.conftest

# isort: split
import triton.backends
import wrapt

import tests.interpreted  # noqa: F401

STAND_IN = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
"""The `cpu` backend that vLLM for CPUs looks for, once; Inductor would take it for a driver."""

with mock.patch.dict(triton.backends.backends, cpu=STAND_IN):
    import vllm.triton_utils  # noqa: F401


def cast_mask(wrapped: Callable, _: Any, args: tuple, kwargs: dict) -> Any:
    """What compares a reduced value is an integer in the interpreter, which it then refuses as a
    mask."""
    at = 1 if wrapped.__name__ == "create_masked_load" else 2
    args[at].data = args[at].data.astype(bool, copy=False)
    return wrapped(*args, **kwargs)


for _name in ("create_masked_load", "create_masked_store"):
    wrapt.wrap_function_wrapper(
        "triton.runtime.interpreter", f"InterpreterBuilder.{_name}", cast_mask
    )

import vllm.v1.sample.ops.topk_topp_sampler as topk_topp

topk_topp.HAS_TRITON = False  # this kernel of vLLM's does not run in the interpreter
