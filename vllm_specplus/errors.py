"""Errors that the user can mend: one sentence with field, value, what is allowed, the way out."""

from __future__ import annotations

import reprlib

VLLM_CHAINS = "a chain of vLLM's own (speculative_model='[ngram]' without speculative_tree)"
"""What is left where there can be no trees, whatever was to draft them."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100


class SpecPlusError(Exception):
    """Base of both kinds; on a command line it is printed as one line, without a traceback."""


class OptionError(SpecPlusError, ValueError):
    """What the user typed cannot be meant."""


class NotBuiltError(SpecPlusError, NotImplementedError):
    """What the user typed is sensible, but this version or this engine does not have it."""


def bad_option(field: str, value: object, reason: str, way_out: str) -> OptionError:
    """The error for `field=value`: why it cannot be, then what to do instead."""
    return OptionError(_sentence(field, value, reason, way_out))


def not_built(field: str, value: object, reason: str, way_out: str) -> NotBuiltError:
    """The error for a sensible `field=value` that is not available: why, then what is."""
    return NotBuiltError(_sentence(field, value, reason, way_out))


def _sentence(field: str, value: object, reason: str, way_out: str) -> str:
    return f"{field}={_SHORT.repr(value)} {reason}; {way_out}."
