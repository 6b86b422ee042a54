"""Drafters: trained heads on either runner, a target's own modules, and trees grown from vLLM's."""
