"""Drafting methods: one file each, registered by name."""

from vllm_specplus.proposers import by_level as by_level
from vllm_specplus.proposers import lookahead as lookahead  # they register themselves
from vllm_specplus.proposers import medusa as medusa
from vllm_specplus.proposers import merged as merged
from vllm_specplus.proposers import ngram as ngram
