"""Our options, in all three spellings, turned into arguments of vLLM's own EngineArgs.

Keyword arguments and command-line flags are folded into the third spelling, the keys of
`speculative_config`; one function translates that. Without any of ours nothing is touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from vllm_specplus.config import (
    METHODS,
    Chain,
    SpecPlusConfig,
    StaticTree,
    parse_methods,
    parse_tree,
)
from vllm_specplus.errors import OptionError, bad_option, not_built
from vllm_specplus.startup.host import (
    Engine,
    native_methods,
    native_rules,
    num_mtp_modules,
    tree_engine,
)

Need = Literal["checks", "trees"]
"""Groups of patches that translated arguments need; stock arguments and most chains need none."""

OPTIONS: dict[str, str] = {
    "speculative_model": "model",
    "num_speculative_tokens": "num_speculative_tokens",
    "speculative_tree": "tree",
    "speculative_verify": "verify",
    "ngram_prompt_lookup_max": "prompt_lookup_max",
    "ngram_prompt_lookup_min": "prompt_lookup_min",
}
"""Keyword argument (and flag) -> key of speculative_config."""

VLLM_ALIASES: dict[str, str] = {
    "spec_method": "method",
    "spec_model": "model",
    "spec_tokens": "num_speculative_tokens",
}
"""vLLM's own short spellings; they join in where one of ours is used."""

TREE_RULES = ("auto", "match")
_NATIVE_RULES = {"rejection": "standard", "block": "block"}
_OUR_NAMES = {method.native: name for name, method in METHODS.items() if method.native}
_OUR_KEYS = ("tree", "verify")


def is_tree_config(speculative_config: Any) -> bool:
    """Whether this speculative_config, a dict or vLLM's object, is one that we wrote for a tree."""
    if not isinstance(speculative_config, Mapping):
        speculative_config = getattr(speculative_config, "__dict__", {})
    return str(speculative_config.get("model")).startswith("vllm_specplus.engine.")


def speaks_ours(arguments: Mapping[str, Any]) -> bool:
    """Whether any of our spellings is used in arguments of EngineArgs."""
    if any(arguments.get(option) is not None for option in OPTIONS):
        return True
    config = arguments.get("speculative_config")
    if not isinstance(config, Mapping):
        return False
    method = config.get("method")
    names = method.split("+") if isinstance(method, str) else []
    ours = method not in native_methods() and any(name in METHODS for name in names)
    return ours or any(config.get(key) is not None for key in _OUR_KEYS)


def fold(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with our keywords and vLLM's aliases moved into `speculative_config`.

    Raises OptionError where the same thing is said twice with different values.
    """
    said = {
        name: arguments[name] for name in OPTIONS | VLLM_ALIASES if arguments.get(name) is not None
    }
    rest = _without_options(arguments)
    rest |= {name: None for name in VLLM_ALIASES if name in rest}
    config = {
        key.replace("-", "_"): value
        for key, value in (arguments.get("speculative_config") or {}).items()
        if value is not None
    }
    for option, value in said.items():
        if option == "speculative_model":
            specs = parse_methods(value)
            _say(config, "method", "+".join(spec.name for spec in specs), option)
            for spec in specs:
                if spec.model is not None:
                    _say(config, "model", spec.model, option)
        else:
            _say(config, (OPTIONS | VLLM_ALIASES)[option], value, option)
    config.setdefault("tree", str(Chain()))
    return rest | {"speculative_config": config}


def _without_options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in OPTIONS}


def _say(config: dict[str, Any], key: str, value: Any, option: str) -> None:
    before = config.get(key)
    if before is not None and _meaning(key, before) != _meaning(key, value):
        raise bad_option(
            option, value, f"contradicts {key}={before!r} in speculative_config", "say it once"
        )
    config[key] = value


def _meaning(key: str, value: Any) -> Any:
    if key == "tree":
        return parse_tree(value)
    return _OUR_NAMES.get(value, value) if key == "method" else value


def translate(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[Need, ...]]:
    """What EngineArgs is to be built with instead of `arguments`, and which patches that needs.

    Raises OptionError for what cannot be meant and NotBuiltError for what is not available.
    """
    for_trees: tuple[Need, ...] = ("checks", "trees")
    if not speaks_ours(arguments):
        translated = is_tree_config(arguments.get("speculative_config"))
        return _without_options(arguments), for_trees if translated else ()
    result = fold(arguments)
    config, others = read(result["speculative_config"])
    native = _native_method(config, str(result.get("model")))
    if native is not None:
        result["speculative_config"] = native_config(config, native) | others
        return result, () if config.verify == "auto" else ("checks",)
    engine = tree_engine()
    _check_built(config, others, engine)
    if isinstance(config.tree, StaticTree) and not engine.static_trees:
        raise not_built(
            "speculative_tree",
            str(config.tree),
            f"is not built for the engine {engine.name}",
            "use 'dynamic:N'",
        )
    result["speculative_config"] = {
        "method": engine.method,
        "model": engine.drafter_cls,
        "num_speculative_tokens": config.num_nodes,
    }
    _set(result, "worker_cls", engine.worker_cls, unset="auto")
    additional = dict(result.get("additional_config") or {})
    _set(additional, "specplus", config.model_dump(mode="json"), unset=None)
    return result | {"additional_config": additional}, for_trees


def _native_method(config: SpecPlusConfig, model: str) -> str | None:
    """vLLM's own method if it runs what is asked for: a chain, without heads of ours.

    Raises OptionError for MTP without heads on a model without modules of its own.
    """
    chain = isinstance(config.tree, Chain) and len(config.methods) == 1
    for spec in config.methods:
        if not METHODS[spec.name].heads:
            continue
        if spec.model is not None:
            return None
        if chain and num_mtp_modules(model):
            return METHODS["mtp"].native
        raise bad_option(
            "speculative_model",
            config.speculative_model,
            f"with speculative_tree={str(config.tree)!r} needs heads for {model!r}",
            f"train them with `vllm-specplus train mtp3 --model {model} --prompts FILE --out DIR` "
            f"and write '{config.speculative_model}DIR'",
        )
    return METHODS[config.methods[0].name].native if chain else None


def _set(arguments: dict[str, Any], name: str, value: Any, unset: Any) -> None:
    """Sets what our engine needs, unless the user has set it to something else."""
    before = arguments.get(name, unset)
    if before not in (unset, value):
        raise bad_option(name, before, "takes the place of what speculative_tree sets", "drop it")
    arguments[name] = value


def read(keys: Mapping[str, Any]) -> tuple[SpecPlusConfig, dict[str, Any]]:
    """Validates the third spelling: our config, and the keys that are vLLM's alone."""
    others = dict(keys)
    method, model = others.pop("method", None), others.pop("model", None)
    if method is None and model is None:
        raise OptionError(
            "speculative_model is missing beside the other speculative options; give "
            "speculative_model='[method]', or a draft model."
        )
    fields = {"num_speculative_tokens", "tree", "verify"}
    options = {key: others.pop(key) for key in fields & others.keys()}
    for key in ("prompt_lookup_max", "prompt_lookup_min"):
        if key in others:
            options[f"ngram_{key}"] = others.pop(key)
    model = _local_path(model)
    text = model if method is None else f"[{_OUR_NAMES.get(method, method)}]{model or ''}"
    return SpecPlusConfig.from_options(options | {"speculative_model": text}), others


def _local_path(model: Any) -> Any:
    """Expands `~`; raises OptionError for what looks like a local path and is not there."""
    if not isinstance(model, str) or not model.startswith(("/", ".", "~")):
        return model
    path = Path(model).expanduser()
    if not path.exists():
        raise bad_option(
            "speculative_model", model, "is a path that does not exist", "correct the path"
        )
    return str(path) if model.startswith("~") else model


def native_config(config: SpecPlusConfig, method: str) -> dict[str, Any]:
    """vLLM's own speculative_config for a chain of one of its methods."""
    (spec,) = config.methods
    native: dict[str, Any] = {
        "method": method,
        "num_speculative_tokens": config.num_speculative_tokens,
    }
    if spec.model is not None:
        native["model"] = spec.model
    for key in ("prompt_lookup_max", "prompt_lookup_min"):
        if f"ngram_{key}" in config.model_fields_set:
            native[key] = getattr(config, f"ngram_{key}")
    if config.verify != "auto":
        native["rejection_sample_method"] = _native_rule(config.verify)
    return native


def _native_rule(verify: str) -> str:
    there = [ours for ours, native in _NATIVE_RULES.items() if native in native_rules()]
    if verify not in there:
        raise not_built(
            "speculative_verify",
            verify,
            "is not available for vLLM's own chains",
            f"use 'auto', {' or '.join(map(repr, there))}",
        )
    return _NATIVE_RULES[verify]


def _check_built(config: SpecPlusConfig, others: Mapping[str, Any], engine: Engine) -> None:
    """Raises for what our engines do not have."""
    chains = ", ".join(f"[{name}]" for name in _OUR_NAMES.values())
    trees = ", ".join(f"[{name}]" for name in engine.methods)
    heads = any(METHODS[spec.name].heads for spec in config.methods)
    chain = isinstance(config.tree, Chain) and not heads
    if chain or config.method not in engine.methods:
        raise not_built(
            "speculative_model",
            config.speculative_model,
            f"with speculative_tree={str(config.tree)!r} is not available in the engine "
            f"{engine.name}",
            f"there are chains of {chains}, and static and dynamic trees of {trees}",
        )
    if config.verify not in TREE_RULES:
        raise not_built(
            "speculative_verify",
            config.verify,
            f"is not available for trees of {trees}",
            f"use {' or '.join(map(repr, TREE_RULES))}",
        )
    if others:
        key, value = next(iter(others.items()))
        raise bad_option(
            f"speculative_config[{key!r}]",
            value,
            "has no meaning for a token tree",
            "leave it out, or use speculative_tree='chain'",
        )
