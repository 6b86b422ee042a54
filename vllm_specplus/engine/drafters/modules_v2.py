"""vLLM's chain of a target's own MTP modules on the V2 runner, with all modules and the hidden
states they expect."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from vllm_specplus.engine.compat import VllmConfig, scoped
from vllm_specplus.engine.compat_v2 import (
    GPUModelRunner,
    MultiModuleMTPSpeculator,
    init_speculator,
    model_runner,
)
from vllm_specplus.engine.drafters.modules import (
    has_several_modules,
    hidden_state_from,
    load_modules,
)


class ModulesSpeculator(MultiModuleMTPSpeculator):
    """vLLM's speculator for several MTP modules."""

    def load_draft_model(self, *args: Any, **kwargs: Any) -> nn.Module:
        self._from_target = hidden_state_from(self.speculative_config) == "target"
        load = partial(super().load_draft_model, *args, **kwargs)
        model: nn.Module = load_modules(load, self.speculative_config)
        return model

    def _run_model(
        self, *args: Any, spec_module_idx: int, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(last hidden states to choose tokens from, hidden states for the next module)."""
        self.model.spec_step = spec_module_idx
        last, hidden_states = super()._run_model(*args, spec_module_idx=spec_module_idx, **kwargs)
        return last, self.hidden_states[: len(last)] if self._from_target else hidden_states


def init_chain(vllm_config: VllmConfig, *args: Any) -> Any:
    """vLLM's `init_speculator`, but for several MTP modules of the target's own."""
    if has_several_modules(vllm_config.speculative_config):
        return ModulesSpeculator(vllm_config, args[0])
    return init_speculator(vllm_config, *args)


class ModulesRunner(GPUModelRunner):
    """vLLM's V2 runner with `ModulesSpeculator`."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        with scoped(model_runner, "init_speculator", init_chain):
            super().__init__(vllm_config, device)
