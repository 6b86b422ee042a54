"""Token trees grown from vLLM's own drafters, on the device and without a word to the host.

vLLM's first pass over the committed rows runs as it is. Every further level is one pass of the
module of its depth over paths (`DraftTree`): a row for each of their nodes, which sees the
committed rows and the path above it. Keys and values of these rows lie in the slots behind the
committed ones that vLLM sets aside for a draft; whatever runs next there writes them anew.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from vllm_specplus.core.draft_tree import DraftTree, below, level_width, path_masks
from vllm_specplus.core.graft import Trunk
from vllm_specplus.core.growth import MAX_FRONTIER
from vllm_specplus.engine.attention import TreeRows, TreeRowsMixin
from vllm_specplus.engine.compat import VllmConfig, async_tensor_h2d, init_logger
from vllm_specplus.engine.compat_v2 import (
    DraftModelSpeculator,
    EagleSpeculator,
    InputBatch,
    MTPSpeculator,
    StandaloneARSpeculator,
    build_slot_mappings_by_layer,
    init_speculator,
)
from vllm_specplus.engine.v2_speculator import NgramTreeSpeculator

logger = init_logger(__name__)
MAX_LOGITS = 1024
"""Nodes whose logits a level has, all requests together, unless there are more requests."""


class Ends(NamedTuple):
    """Where the paths of a level begin: position [num_reqs], and the hidden state that the rows of
    depth 1 take [num_reqs, hidden_size]; is_there: bool [num_reqs], whether it was run."""

    positions: torch.Tensor
    hidden_states: torch.Tensor
    is_there: torch.Tensor | bool


class GrowingMixin(DraftModelSpeculator):
    """Over a speculator of vLLM's that hands hidden states from one token to the next.

    Kept of its first pass, by request of the batch: the last rows that were committed, and of each
    level the hidden states that a row behind its last final one takes.

    grows: whether there can be trees: drafts are not drawn, and attention knows what a tree is.
    takes_states: whether it takes hidden states; else its first pass goes up to the root itself,
    into the first of the slots that are set aside for a draft.
    """

    hidden_states: torch.Tensor
    inputs_embeds: torch.Tensor | None
    last_token_indices: torch.Tensor
    grows, takes_states = False, True

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        of_rows, size = self.max_num_reqs, self.hidden_size * self.takes_states
        self._last_states = torch.zeros(of_rows, self.hidden_size, dtype=self.dtype, device=device)
        self._level_states = self._last_states.new_zeros(self.num_speculative_steps, of_rows, size)
        self._last_positions = torch.zeros_like(self.last_token_indices)

    def set_attn(self, *args: Any, **kwargs: Any) -> None:
        super().set_attn(*args, **kwargs)
        layers = self.vllm_config.compilation_config.static_forward_context
        attention = (layers[name].impl for name in self.draft_attn_layer_names)
        masked = all(isinstance(impl, TreeRowsMixin) for impl in attention)
        self.grows = masked and self.draft_logits is None
        if not masked:
            logger.warning_once("The drafter's attention knows no trees: it drafts a chain.")
        elif not self.grows:
            logger.info_once("Sampled drafts are a chain: trees are grown of the likeliest tokens.")

    def _run_model(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        last, hidden_states = super()._run_model(*args, **kwargs)
        level, positions = kwargs.get("spec_module_idx", 0), self.input_buffers.positions
        self._keep(level, positions, last, hidden_states)
        return last, hidden_states

    def sample_draft(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Where trees are grown nobody reads the tokens of vLLM's chain: no logits for them."""
        if self.grows:
            return self.draft_tokens.new_zeros(len(hidden_states))
        return super().sample_draft(hidden_states, *args, **kwargs)

    def profile_growth(self) -> None:
        """The logits of the widest level, for vLLM to see what memory they take; and the kernels of
        levels at batch sizes that its warm-up leaves out, which are compiled by powers of two."""
        most = self.max_num_reqs
        num_rows = max(min(MAX_LOGITS, MAX_FRONTIER * most), most)
        states = self._last_states.new_zeros(num_rows, self._last_states.shape[1])
        logits = self.compute_draft_logits(states, 0)
        for num_reqs in (1 << i for i in range(most.bit_length())):
            chain_only = torch.zeros(num_reqs, dtype=torch.bool, device=self.device)
            tree, width = DraftTree(2, chain_only, None), min(MAX_FRONTIER, num_rows // num_reqs)
            tree.branch(logits[:num_reqs], width)
            tree.branch(logits[: num_reqs * width], 1)

    def _keep(self, level: int, positions: torch.Tensor, *states: torch.Tensor) -> None:
        last, hidden_states = states
        rows = (self.last_token_indices - level).clamp(0, len(last) - 1)
        self._level_states[level] = hidden_states[rows]
        if not level:
            self._last_states.copy_(last[rows])
            self._last_positions.copy_(positions[rows])

    def _ends(self, level: int, num_reqs: int) -> Ends:
        """One module for all levels: its rows follow each other."""
        behind = self._last_positions[:num_reqs] + 1
        return Ends(behind, self._level_states[0, :num_reqs], True)

    def _module(self, level: int) -> dict[str, int]:
        """How `_run_model` is told of the module of a level."""
        return {}

    def _run_rows(self, level: int, states: torch.Tensor, *metadata: Any) -> Any:
        """`_run_model` for rows whose tokens and positions lie in the buffers."""
        num_rows = len(states)
        self.hidden_states[:num_rows] = states
        if self.inputs_embeds is not None:
            ids = self.input_buffers.input_ids[:num_rows]
            self.inputs_embeds[:num_rows] = self.model.embed_input_ids(ids)
        return super()._run_model(num_rows, *metadata, None, **self._module(level))

    @torch.inference_mode()
    def grow(
        self,
        batch: InputBatch,
        num_sampled: torch.Tensor,
        trees: NgramTreeSpeculator,
        num_verified: int | None,
    ) -> Trunk:
        """Trees for a batch that `propose` has drafted for, as `trees` wants them; the better half
        of their nodes comes before any n-gram.

        num_verified: so many nodes will be looked at, None: all. A level has no more rows than
        that, for which there are KV slots but at the very end of the longest request.
        """
        num_reqs, num_levels = batch.num_reqs, self.num_speculative_steps
        num_nodes = num_verified or trees.config.num_nodes
        room = num_nodes - (not self.takes_states)
        room = min(room, self.max_model_len, self.max_num_tokens // num_reqs)
        chain_only = trees.req_states.chain_only[batch.idx_mapping[:num_reqs]]
        tree, slots = DraftTree(num_levels, chain_only, trees.shape), self._num_slots(batch)
        logits = self.compute_draft_logits(self._last_states[:num_reqs], 0)
        states = self._last_states.new_empty(num_reqs, 1, 0, self._level_states.shape[2])
        drafts = None
        for level in range(1, num_levels):
            width = min(level_width(level, room), max(1, MAX_LOGITS // num_reqs))
            if not width:
                break
            above = tree.branch(logits, width, drafts)
            ends = self._ends(level, num_reqs)
            num_rows = width * level
            drafts = (num_sampled > 0) & (ends.positions + num_rows <= slots) & ends.is_there
            first = ends.hidden_states[:, None, None].expand(-1, width, -1, -1)
            states = torch.cat([first, below(states, above)], 2)
            last, states = self._run_level(level, tree.paths, ends.positions, states, drafts)
            logits = self.compute_draft_logits(last, level)
        tree.branch(logits, 1, drafts)
        rows = tree.rows(trees.num_nodes)
        return Trunk(rows.tokens, rows.parents, num_first=-(-num_nodes // 2))

    def _num_slots(self, batch: InputBatch) -> torch.Tensor:
        """KV slots of each request, int64 [num_reqs]: its blocks', as the host knows them."""
        tables = self.block_tables
        slots = tables.num_blocks.np[:, batch.idx_mapping_np].T * tables.block_sizes
        drafts = [bool(groups) for groups in self.attn_groups]
        return async_tensor_h2d(slots[:, drafts].min(1), self.device, torch.int64)

    def _run_level(
        self,
        level: int,
        paths: torch.Tensor,
        begins: torch.Tensor,
        hidden_states: torch.Tensor,
        drafts: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the rows of all paths, int64 [num_reqs, width, level].

        Returns what tokens are chosen from behind each path, [num_reqs * width, hidden_size], and
        what the next level's rows below each row take, [num_reqs, width, level, hidden_size].
        """
        num_reqs, width, _ = paths.shape
        num_rows = num_reqs * width * level
        depths = torch.arange(level, device=paths.device).expand(num_reqs, width, -1)
        positions = (begins[:, None, None] + depths).clamp(0, self.max_model_len - 1).flatten()
        self.input_buffers.input_ids[:num_rows] = paths.flatten()
        self.input_buffers.positions[:num_rows] = positions
        attention, slots = self._attention(positions, begins, drafts, width, level)
        last, hidden = self._run_rows(level, hidden_states.flatten(0, 2), attention, slots)
        last, hidden = (part.unflatten(0, (num_reqs, width, level)) for part in (last, hidden))
        return last[:, :, -1].flatten(0, 1), hidden

    def _attention(
        self,
        positions: torch.Tensor,
        begins: torch.Tensor,
        drafts: torch.Tensor,
        width: int,
        level: int,
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Metadata and slots by layer. Requests without drafts write nothing."""
        num_reqs, num_rows = len(begins), width * level
        tree: dict[str, Any] = {
            "query_start_loc": torch.arange(
                0, len(positions) + 1, num_rows, dtype=torch.int32, device=positions.device
            ),
            "requests": None,
            "covers_all": True,
            "ancestor_mask": path_masks(width, level, positions.device).repeat(num_reqs, 1),
            "positions": positions,
            "context_lens": begins.where(drafts, 0).int(),
            "max_query_len": num_rows,
        }
        places = begins[:, None] + torch.arange(num_rows, device=positions.device)
        metadata: dict[str, Any] = {}
        mappings = []
        for index, size in enumerate(self.block_tables.block_sizes):
            table = self.block_tables.input_block_tables[index][:num_reqs]
            block = table.gather(1, (places // size).clamp(0, table.shape[1] - 1))
            mappings.append((block * size + places % size).where(drafts[:, None], -1).flatten())
            for group in self.attn_groups[index]:
                blocks = group.map_to_kernel_block_table(table)
                rows = SimpleNamespace(tree=TreeRows(block_table=blocks, **tree))
                metadata |= dict.fromkeys(group.layer_names, rows)
        slots = build_slot_mappings_by_layer(torch.stack(mappings), self.kv_cache_config)
        return metadata, slots


class GrowingEagleSpeculator(GrowingMixin, EagleSpeculator):
    """vLLM's EAGLE and EAGLE-3."""


class GrowingMTPSpeculator(GrowingMixin, MTPSpeculator):
    """vLLM's one MTP module, unrolled."""


class GrowingDraftSpeculator(GrowingMixin, StandaloneARSpeculator):
    """vLLM's draft model."""

    takes_states = False

    def _run_model(self, input_ids: Any, positions: Any, *args: Any, **kwargs: Any) -> Any:
        last = StandaloneARSpeculator._run_model(self, input_ids, positions, *args, **kwargs)
        self._keep(0, positions, last, last[:, :0])
        return last

    def _run_rows(self, level: int, states: torch.Tensor, *metadata: Any) -> Any:
        buffers, num_rows = self.input_buffers, len(states)
        rows = buffers.input_ids[:num_rows], buffers.positions[:num_rows]
        last = StandaloneARSpeculator._run_model(self, *rows, *metadata, None)
        return last, last[:, :0]

    def _multi_step_decode(self, *args: Any, **kwargs: Any) -> None:
        if not self.grows:
            super()._multi_step_decode(*args, **kwargs)


def init_growing(vllm_config: VllmConfig, *args: Any) -> Any:
    """vLLM's `init_speculator` for one module or a draft model."""
    options = vllm_config.speculative_config
    if options.method in ("eagle", "eagle3"):
        return GrowingEagleSpeculator(vllm_config, args[0])
    if options.uses_draft_model():
        return GrowingDraftSpeculator(vllm_config, args[0])
    if options.method == "mtp" and not options.use_gemma4_mtp():
        return GrowingMTPSpeculator(vllm_config, args[0])
    return init_speculator(vllm_config, *args)
