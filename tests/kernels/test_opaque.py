"""Ops inside torch.compile: one node of the graph, the eager result.

Seen to fail: without the registration the graph breaks; without `mutates_args` the output is lost.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from specplus_kernels import tree_attention, tree_attention_mla

from tests.kernels.attention_case import chain, make_case, random_tree


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_tree_attention_compiles_into_one_graph(any_provider: str, backend: str) -> None:
    case = make_case([random_tree(5), chain(2)], [40, 3])
    given: dict[str, Any] = {"scale": 0.125, **case.tensors}

    def layer(query: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(query)
        return 2 * tree_attention(**{**given, "query": query + 1}, out=out)

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(given["query"]), layer(given["query"]))


def test_tree_attention_mla_compiles_into_one_graph(gpu_provider: str) -> None:
    case = make_case([random_tree(5), chain(2)], [40, 3], num_kv_heads=1, layout="plain")
    tensors: dict[str, Any] = dict(case.tensors)
    latent = tensors.pop("key_cache")[:, :, 0]
    del tensors["value_cache"]

    def layer(query: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(*query.shape[:2], 32)
        given = {**tensors, "query": query + 1}
        return 2 * tree_attention_mla(**given, latent_cache=latent, scale=0.125, out=out)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tensors["query"]), layer(tensors["query"]))
