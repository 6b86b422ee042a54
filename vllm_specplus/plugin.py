"""vLLM's entry points. All they do is to arm the options: nothing is imported or started here.

vLLM calls `platform_plugin` while it is half imported, in every process, and `register` once more
when it loads its general plugins; `import vllm_specplus` arms as well, for processes in which
VLLM_TARGET_DEVICE=cpu keeps vLLM from asking platform plugins.
"""

from __future__ import annotations

import logging
import sys
from types import ModuleType
from typing import Any

import wrapt

_ARG_UTILS = "vllm.engine.arg_utils"
_MODELS = "vllm.model_executor.models.registry"


def register() -> None:
    """Entry point of vllm.general_plugins."""
    arm()


def platform_plugin() -> None:
    """Entry point of vllm.platform_plugins: called early; None says that we are no platform."""
    arm()


def arm() -> None:
    """Has EngineArgs understand our options from the moment that it can be used, and vLLM know our
    draft models. Idempotent."""
    wrapt.register_post_import_hook(_add_models, _MODELS)
    module = sys.modules.get(_ARG_UTILS)
    if module is not None and not _complete(module):
        module.__class__ = _HalfImported
    else:
        wrapt.register_post_import_hook(_patch, _ARG_UTILS)


def _add_models(registry: ModuleType) -> None:
    registry.ModelRegistry.register_model(
        "SpecPlusMTP", "vllm_specplus.engine.drafters.heads:SpecPlusMTP"
    )


def _complete(module: ModuleType) -> bool:
    return "AsyncEngineArgs" in vars(module)


class _HalfImported(ModuleType):
    """arg_utils when its own import brought us here: patched when a class is first taken from it.

    No import hook can reach a module that is already being executed.
    """

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name in ("EngineArgs", "AsyncEngineArgs") and _complete(self):
            self.__class__ = ModuleType  # type: ignore[assignment]
            _patch(self)
        return value


def _patch(_: ModuleType) -> None:
    from vllm_specplus.errors import SpecPlusError
    from vllm_specplus.startup import patches

    try:
        patches.apply("options")
    except SpecPlusError as error:
        logging.getLogger("vllm.specplus").error("vllm_specplus is off: %s", error)
