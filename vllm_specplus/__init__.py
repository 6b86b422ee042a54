"""Speculative decoding for stock vLLM: MTP, token trees and one exact verifier."""

from vllm_specplus.plugin import arm

__version__ = "0.1.0"

arm()
