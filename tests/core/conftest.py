"""Hypothesis without its deadline: an example that takes long shows a busy machine, no error."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("core", deadline=None)
settings.load_profile("core")
