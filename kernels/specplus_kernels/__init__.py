"""Ops for token-tree speculation on plain tensors: torch (and later Triton) only, no vLLM types.

Each op is a folder with one public name; `dispatch` says which implementation runs.
"""

from specplus_kernels.kv_commit import KVCommitPlan, kv_commit
from specplus_kernels.row_argmax import row_argmax
from specplus_kernels.row_gumbel_argmax import row_gumbel_argmax
from specplus_kernels.tree_attention import tree_attention

__all__ = ["KVCommitPlan", "kv_commit", "row_argmax", "row_gumbel_argmax", "tree_attention"]
