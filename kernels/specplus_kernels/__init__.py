"""Ops for token-tree speculation on plain tensors: torch and Triton alone, no vLLM types.

Each op is a folder with one public name (`tree_grow` has two); `dispatch` says which implementation
runs. Nothing here imports Triton before a Triton kernel runs.
"""

from specplus_kernels.int8_linear import Int8Weight, int8_linear
from specplus_kernels.kv_commit import KVCommitPlan, kv_commit
from specplus_kernels.ngram_match import ngram_match
from specplus_kernels.rejection import rejection
from specplus_kernels.row_argmax import row_argmax
from specplus_kernels.row_commit import row_commit
from specplus_kernels.row_gumbel_argmax import row_gumbel_argmax
from specplus_kernels.tree_attention import tree_attention
from specplus_kernels.tree_attention_mla import tree_attention_mla
from specplus_kernels.tree_grow import expand, rerank
from specplus_kernels.tree_rejection import tree_rejection
from specplus_kernels.tree_stage import tree_stage
from specplus_kernels.tree_verify import tree_verify
from specplus_kernels.verify import Verified, verify

__all__ = [
    "Int8Weight",
    "KVCommitPlan",
    "Verified",
    "expand",
    "int8_linear",
    "kv_commit",
    "ngram_match",
    "rejection",
    "rerank",
    "row_argmax",
    "row_commit",
    "row_gumbel_argmax",
    "tree_attention",
    "tree_attention_mla",
    "tree_rejection",
    "tree_stage",
    "tree_verify",
    "verify",
]
