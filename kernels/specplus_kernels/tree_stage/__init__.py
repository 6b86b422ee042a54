"""tree_stage: positions and ancestor masks of the token trees of a step, from their codes.

A node travels through the engine's flat draft list as one code: its token in the low 32 bits, above
them how many rows its parent lies before the previous row. So a chain is its plain tokens, a prefix
of the codes is the code of a prefix of the tree, and a negative code is a placeholder on a chain.

    parent[i] = i - 1 - (code[i - 1] >> 32)        (row 0 is the root)
    ancestors[i] = {i} | ancestors[parent[i]]
    position[i] = position[0] + |ancestors[i]| - 1

The kernel takes the ancestors as the transitive closure of the parents' one-hot matrix, squared
log2(rows) times on the matrix units: nothing is walked row by row. One program per request.
"""

from __future__ import annotations

import torch

from specplus_kernels import dispatch
from specplus_kernels.tree_grow.rows import MAX_ROWS, WORD_BITS

__all__ = ["tree_stage"]


def tree_stage(
    codes: torch.Tensor,  # [num_reqs, max_nodes] int64
    query_start_loc: torch.Tensor,  # [num_reqs + 1] int32
    cu_num_rows: torch.Tensor,  # [num_reqs + 1] int32
    positions: torch.Tensor,  # [num_tokens] int64, changed in place
    ancestor_mask: torch.Tensor,  # [num_tokens, words] int64, changed in place
) -> None:
    """Stages the trees; a request's tree are the last of its rows in the step.

    Args:
        codes: nodes beyond a request's tree rows are ignored.
        query_start_loc: the first row of each request in the step.
        cu_num_rows: running sums of the tree rows of each request, root included.
        positions: sequential by request; those of tree rows become the root's plus the depth.
        ancestor_mask: bit j of a tree row's words is the request's tree row j. Other rows are left
            alone.

    Raises:
        ValueError: a shape or dtype does not fit.

    """
    _check(codes, query_start_loc, cu_num_rows, positions, ancestor_mask)
    if dispatch.provider(codes.device) == "triton":
        from specplus_kernels.tree_stage.kernel import tree_stage as run
    else:
        from specplus_kernels.tree_stage.reference import tree_stage as run
    run(codes, query_start_loc, cu_num_rows, positions, ancestor_mask)


def _check(
    codes: torch.Tensor,
    query_start_loc: torch.Tensor,
    cu_num_rows: torch.Tensor,
    positions: torch.Tensor,
    ancestor_mask: torch.Tensor,
) -> None:
    num_reqs, max_nodes = codes.shape
    if not query_start_loc.shape == cu_num_rows.shape == (num_reqs + 1,):
        raise ValueError(
            f"query_start_loc {tuple(query_start_loc.shape)} and cu_num_rows "
            f"{tuple(cu_num_rows.shape)} must be [{num_reqs + 1}], one more than requests in codes"
        )
    wide = WORD_BITS * ancestor_mask.shape[1]
    if ancestor_mask.shape[0] != positions.shape[0] or max_nodes >= min(wide, MAX_ROWS):
        raise ValueError(
            f"ancestor_mask {tuple(ancestor_mask.shape)} must have a row per position "
            f"({positions.shape[0]}) and, at {WORD_BITS} bits a word, more bits than the "
            f"{max_nodes} nodes; at most {MAX_ROWS - 1} nodes are allowed"
        )
    if {codes.dtype, positions.dtype, ancestor_mask.dtype} != {torch.int64}:
        raise ValueError(
            f"codes, positions and ancestor_mask must be int64, got {codes.dtype}, "
            f"{positions.dtype} and {ancestor_mask.dtype}"
        )
    for name, tensor in (
        ("codes", codes),
        ("positions", positions),
        ("ancestor_mask", ancestor_mask),
    ):
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} must be dense within a row, got strides {tensor.stride()}")
