"""Drafters with weights, between vLLM's runners and the trees that grow from them."""
