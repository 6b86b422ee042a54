"""Tests of vllm_specplus; the folders mirror the package's."""
