"""`[mtp]` and `[mtp3]` without a path: has vLLM use the MTP modules that the target has.

vLLM asks the draft's config for `num_nextn_predict_layers`, whatever the model calls its count, and
with more tokens than modules it begins again with the first, over its KV; its V1 runner runs no
other. Here the config counts as many modules as the draft is deep, and our worker gives those that
the checkpoint does not have the weights of the last one (`engine/drafters/modules.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from vllm_specplus.config import METHODS, SpecPlusConfig
from vllm_specplus.core.mtp_models import NEXTN, find_mtp_model
from vllm_specplus.errors import OptionError, bad_option
from vllm_specplus.startup.host import own_modules, tree_engine

logger = logging.getLogger("vllm.specplus")


def takes_own_modules(config: SpecPlusConfig) -> bool:
    """Whether the target's own modules are asked for."""
    return any(METHODS[spec.name].heads and spec.model is None for spec in config.methods)


def runs_several(config: SpecPlusConfig, model: str) -> bool:
    """Whether more than one of the modules of `model` draft."""
    row, num_modules = own_modules(model)
    return row is not None and row.chain(num_modules, config.num_speculative_tokens)[-1] > 1


def modules_worker(config: SpecPlusConfig, model: str) -> str | None:
    """Says in the log which modules of `model` draft; the worker that a chain of them needs, None
    for vLLM's own."""
    depth = config.num_speculative_tokens
    row, num_modules = own_modules(model)
    assert row is not None
    chain = row.chain(num_modules, depth)
    fed = row.hidden_state_from or "previous"
    logger.info(
        "%s: %s has %d MTP module%s; the %d drafts come from %s",
        config.speculative_model,
        row.name,
        num_modules,
        "" if num_modules == 1 else "s",
        depth,
        f"modules {', '.join(map(str, chain))}, each fed the hidden state of "
        + {"previous": "the one before", "target": "the target"}[fed]
        if chain[-1] > 1
        else "module 1, unrolled",
    )
    return tree_engine().modules_worker_cls if chain[-1] > 1 else None


@contextmanager
def counted_modules(engine_args: Any) -> Iterator[None]:
    """While a SpeculativeConfig is made for one of our workers: its draft counts the modules."""
    from vllm.config import SpeculativeConfig

    from vllm_specplus.engine.compat import scoped

    keys = engine_args.speculative_config or {}
    ours = str(engine_args.worker_cls).startswith("vllm_specplus.")
    if not ours or keys.get("method") != "mtp":
        yield
        return
    compose = SpeculativeConfig.compose_draft_hf_overrides

    def counted(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
        return partial(count_modules, compose(*args, **kwargs), keys["num_speculative_tokens"])

    with scoped(SpeculativeConfig, "compose_draft_hf_overrides", staticmethod(counted)):
        yield


def set_draft_model(
    speculative: Any, config: SpecPlusConfig, create: Callable[[], Any], engine_args: Any
) -> None:
    """Gives the SpeculativeConfig of an engine of ours what drafts by `config`, if that is of a
    class of vLLM's: `create` makes the SpeculativeConfig of `engine_args`.

    `specplus_drafters`: one SpeculativeConfig for each draft model; the first one's model is also
    that of the engine's.
    """
    from vllm_specplus.engine.compat import scoped

    common = {"num_speculative_tokens": config.num_speculative_tokens, "revision": config.revision}
    specs = [spec for spec in config.methods if METHODS[spec.name].is_draft_model]
    asked = [{"method": METHODS[spec.name].native, "model": spec.model} for spec in specs]
    if takes_own_modules(config):
        asked = [{"method": METHODS["mtp"].native, "revision": None}]
    drafters = []
    for keys in asked:
        with scoped(engine_args, "speculative_config", common | keys), counted_modules(engine_args):
            drafters.append(create())
    if drafters:
        speculative.draft_model_config = drafters[0].draft_model_config
        speculative.draft_parallel_config = drafters[0].draft_parallel_config
    speculative.specplus_drafters = drafters


@contextmanager
def vocabularies_compared() -> Iterator[None]:
    """While a SpeculativeConfig is made: vLLM's check that a draft model has the vocabulary of its
    target is one sentence, which names our option."""
    from pydantic import ValidationError
    from vllm.config import SpeculativeConfig

    from vllm_specplus.engine.compat import scoped

    check = SpeculativeConfig.verify_equal_vocab_size_if_draft_model

    def compare(speculative: Any) -> None:
        try:
            check(speculative)
        except ValueError:
            target, draft = speculative.target_model_config, speculative.draft_model_config
            raise bad_option(
                "speculative_model",
                draft.model,
                f"has a vocabulary of {draft.get_vocab_size()} tokens, and that of {target.model} "
                f"has {target.get_vocab_size()}",
                "give a draft model of the same vocabulary",
            ) from None

    with scoped(SpeculativeConfig, "verify_equal_vocab_size_if_draft_model", compare):
        try:
            yield
        except ValidationError as error:
            cause = error.errors()[0].get("ctx", {}).get("error")
            raise cause if isinstance(cause, OptionError) else error from None


def count_modules(override: Callable[[Any], Any], depth: int, hf_config: Any) -> Any:
    """`override`, which makes a draft's config out of the target's, and the modules counted there.

    Only where vLLM's class runs more than one of them in a draft of `depth` tokens.
    """
    fields = hf_config.to_dict() | {"model_type": hf_config.model_type}
    row = find_mtp_model(fields)
    num_modules = 0 if row is None else row.count(fields)
    draft = override(hf_config)
    if row is not None and row.chain(num_modules, depth)[-1] > 1:
        num = max(num_modules, depth)
        for config in (draft, draft.get_text_config()):
            config.update({"n_predict": num, NEXTN: num, row.field: num})
        draft.specplus_num_modules = num_modules
    return draft
