"""Speculative decoding for stock vLLM: MTP, token trees and one exact verifier."""

__version__ = "0.1.0"
