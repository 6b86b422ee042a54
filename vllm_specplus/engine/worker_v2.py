"""The worker of the V2 engine: builds our model runner where vLLM builds its own."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

from vllm_specplus.engine.compat import CPUWorker, scoped
from vllm_specplus.engine.compat_v2 import CPUModelRunner
from vllm_specplus.engine.v2 import SpecPlusV2CPUModelRunner


class SpecPlusV2CPUWorker(CPUWorker):
    """vLLM's CPU worker around `SpecPlusV2CPUModelRunner`."""

    def init_device(self) -> None:
        module = sys.modules[CPUModelRunner.__module__]
        with scoped(module, "CPUModelRunner", SpecPlusV2CPUModelRunner):
            super().init_device()

    def specplus_stats(self) -> dict[str, Any]:
        """Counters of the speculative rounds so far; call through `collective_rpc`."""
        return asdict(self.model_runner.model_state.stats())
