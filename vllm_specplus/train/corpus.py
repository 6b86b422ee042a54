"""The target's hidden states over its text, on disk, and batches of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vllm_specplus.errors import bad_option
from vllm_specplus.train.teacher import Teacher
from vllm_specplus.train.text import Text

_TOKENS_PER_FORWARD = 4096


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples of several lengths, filled up with zeros.

    tokens: int64 [B, T + num_depths]; hidden: bfloat16 [B, T, hidden_size], the target's after its
    final norm; lengths, prompt_lens: int64 [B], of the sample and of its prompt. T is the longest.
    """

    tokens: Tensor
    hidden: Tensor
    lengths: Tensor
    prompt_lens: Tensor

    def inside(self, ahead: int) -> Tensor:
        """bool [B, T]: rows t for which the sample has a token t + ahead."""
        places = torch.arange(self.hidden.shape[1], device=self.lengths.device)
        return places[None] + ahead < self.lengths[:, None]


class Corpus:
    """Text with hidden states, bfloat16 [num_tokens, hidden_size] in one file.

    training, held_out: indices of samples that are long enough. Raises OptionError if none is.
    """

    def __init__(self, text: Text, file: Path, teacher: Teacher, num_depths: int) -> None:
        self.text, self.file, self.teacher, self.num_depths = text, file, teacher, num_depths
        self.hidden_size = teacher.config.hidden_size
        written = text.offsets.diff() - text.prompt_lens
        long_enough = written > num_depths
        self.training = torch.nonzero(~text.held_out & long_enough).flatten().tolist()
        self.held_out = torch.nonzero(text.held_out & long_enough).flatten().tolist()
        if not self.training or not self.held_out:
            raise bad_option(
                "new_tokens",
                int(written.max()),
                f"is what the target wrote at most, too short for {num_depths} drafts",
                "take more, or other prompts",
            )

    def compute(self, on_progress: Callable[[int], object]) -> None:
        """Writes what is missing in the file; `on_progress` gets the number of tokens done."""
        row_bytes = 2 * self.hidden_size
        done = self.file.stat().st_size // row_bytes if self.file.exists() else 0
        first = int(torch.searchsorted(self.text.offsets, done, right=True)) - 1
        with self.file.open("ab") as out:
            out.truncate(int(self.text.offsets[first]) * row_bytes)
            num_samples, longest = len(self.text.kinds), int(self.text.offsets.diff().max())
            step = max(1, _TOKENS_PER_FORWARD // longest)
            for start in range(first, num_samples, step):
                indices = range(start, min(start + step, num_samples))
                tokens, lengths = self._tokens(indices)
                hidden = self.teacher.hidden(tokens.to(self.teacher.device))
                for row, length in zip(hidden, lengths.tolist(), strict=True):
                    out.write(_as_bytes(row[:length]))
                on_progress(int(self.text.offsets[indices.stop]))

    def batch(self, indices: Sequence[int]) -> Batch:
        """Samples by their index, on the teacher's device."""
        device, offsets = self.teacher.device, self.text.offsets
        tokens, lengths = self._tokens(indices)
        hidden = torch.zeros(len(indices), tokens.shape[1], self.hidden_size, dtype=torch.bfloat16)
        shape = (len(self.text.tokens), self.hidden_size)
        stored = np.memmap(self.file, np.int16, "r", shape=shape)
        for row, index in enumerate(indices):
            rows = torch.from_numpy(np.array(stored[offsets[index] : offsets[index + 1]]))
            hidden[row, : len(rows)] = rows.view(torch.bfloat16)
        padded = torch.nn.functional.pad(tokens, (0, self.num_depths))
        prompt_lens = self.text.prompt_lens[list(indices)]
        return Batch(*(x.to(device) for x in (padded, hidden, lengths, prompt_lens)))

    def embeddings(self, batch: Batch) -> Tensor:
        """[B, T + num_depths - 1, hidden_size]: row i is that of token i + 1."""
        return self.teacher.embed(batch.tokens[:, 1:])

    def token_counts(self) -> Tensor:
        """How often each token of the vocabulary was written for training, int64 [vocab_size]."""
        counts = torch.zeros(len(self.teacher.head), dtype=torch.int64)
        for index in self.training:
            written = self.text[index][int(self.text.prompt_lens[index]) :]
            counts += torch.bincount(written, minlength=len(counts))
        return counts

    def _tokens(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        samples = [self.text[index].long() for index in indices]
        lengths = torch.tensor([len(sample) for sample in samples])
        return torch.nn.utils.rnn.pad_sequence(samples, batch_first=True), lengths


def _as_bytes(rows: Tensor) -> bytes:
    return rows.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()
