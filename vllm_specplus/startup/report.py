"""What `vllm-specplus check` finds out: versions, machine, hooks, engine, a model's refusals."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vllm_specplus.errors import NotBuiltError, OptionError
from vllm_specplus.startup.host import (
    CPU_ENGINE,
    V2_ENGINE,
    check_hooks,
    engine_config,
    find_hook,
    tree_engine,
    vllm_version,
    wanted_engine,
)
from vllm_specplus.startup.patches import PATCHES
from vllm_specplus.startup.refusals import tree_refusals

_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")


def collect(model: str | None) -> dict[str, Any]:
    """All findings, ready for JSON; `ok`: token trees can run here (and with `model`, if any).

    The other engine is that for GPUs, whose hooks a CPU machine can look up as well.
    """
    hooks = [*check_hooks(wanted_engine()), *(find_hook(str(p), p.module, p.path) for p in PATCHES)]
    v2 = [hook for hook in check_hooks(V2_ENGINE) if hook not in hooks]
    engine = _engine()
    refused = [] if model is None or engine["name"] is None else _refused(model)
    return {
        "ok": engine["name"] is not None and not refused and not any(h.missing for h in hooks),
        "versions": _versions(),
        "machine": _machine(),
        "engine": engine,
        "model": None if model is None else {"name": model, "refused": refused},
        "hooks": [asdict(hook) for hook in hooks],
        "hooks of the other engine": [asdict(hook) for hook in v2],
    }


def _versions() -> dict[str, str | None]:
    versions = {"vllm": vllm_version(), "python": platform.python_version()}
    for name in ("vllm_specplus", "torch", "triton", "transformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def _machine() -> dict[str, Any]:
    import torch
    from specplus_kernels import cpu_library

    cpuinfo = Path("/proc/cpuinfo")
    words = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    gpus = range(torch.cuda.device_count())
    return {
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "cpu_features": [flag for flag in _CPU_FLAGS if flag in words],
        "compiled_kernels": cpu_library.load() is not None,
        "gpus": [torch.cuda.get_device_name(gpu) for gpu in gpus],
    }


def _engine() -> dict[str, str | None]:
    """The engine for trees and why; chains of vLLM's methods always stay with vLLM."""
    try:
        engine = tree_engine()
    except NotBuiltError as error:
        return {"name": None, "why": str(error)}
    runner = "V1" if engine is CPU_ENGINE else "V2"
    where = "a GPU" if engine is V2_ENGINE else "a CPU"
    why = f"vLLM {vllm_version()} on {where} uses its {runner} runner, and every hook is there"
    return {"name": engine.name, "why": why}


def _refused(model: str) -> list[str]:
    try:
        vllm_config = engine_config(model, skip_tokenizer_init=True)
    except OptionError as error:
        return [str(error)]
    return tree_refusals(vllm_config)
