"""Fits heads of any kind to a target's distribution, so that it can be interrupted at any step.

Loss: KL of the heads' distribution from the target's at temperature 1, over a sample of the draft
vocabulary's rows, and what the kind of heads adds, with weights 0.8^k (distillation: Hinton et al.
2015, arXiv 1503.02531; sampled rows: Jean et al. 2015, arXiv 1412.2007). The target's is its own
head on its own hidden state one step on, so no logits are stored. AdamW (Loshchilov and Hutter
2019, arXiv 1711.05101) over float32 weights, a cosine schedule. All randomness comes from (seed,
step), so a run that was interrupted and resumed goes the way of one that was not.
"""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from vllm_specplus.errors import bad_option
from vllm_specplus.train.acceptance import TOP, Ranks, rank_of
from vllm_specplus.train.corpus import Batch, Corpus
from vllm_specplus.train.heads import Heads

_DEPTH_WEIGHT = 0.8
_WARMUP = 0.02
_MAX_NORM = 1.0


@dataclass(frozen=True, slots=True)
class FitSettings:
    """max_tokens counts passes over tokens, max_seconds time in steps: the first to come ends it.

    batch_size: samples of a step; head_rows: rows of the draft vocabulary in its loss; eval_tokens:
    passes between evaluations; save_seconds: between checkpoints.
    """

    seed: int = 0
    learning_rate: float = 3e-4
    batch_size: int = 8
    head_rows: int = 8192
    compute: Literal["bfloat16", "float32"] = "bfloat16"
    max_tokens: float = math.inf
    max_seconds: float = math.inf
    eval_tokens: int = 100_000
    eval_samples: int = 16
    save_seconds: float = 60.0

    def identity(self) -> dict[str, Any]:
        """What must not change when a run is resumed; its limits may."""
        free = ("max_tokens", "max_seconds", "save_seconds", "eval_tokens", "eval_samples")
        return {name: value for name, value in asdict(self).items() if name not in free}


@dataclass(slots=True)
class Progress:
    """Where a run stands: steps, token passes, seconds in steps, the last loss (nats a token), and
    after how many tokens which top-1, -2, -4 acceptance per depth was measured."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float = math.nan
    losses: list[tuple[int, float]] = field(default_factory=list)
    evaluations: list[tuple[int, list[list[float]]]] = field(default_factory=list)


class HeadsTrainer:
    """One run. Its state is in `file`; a run that finds one goes on from there."""

    def __init__(
        self,
        heads: Heads,
        corpus: Corpus,
        draft_vocab: Tensor | None,
        settings: FitSettings,
        file: Path,
    ) -> None:
        self.heads, self.corpus, self.settings, self.file = heads, corpus, settings, file
        self.dtype = getattr(torch, settings.compute)
        head, device = corpus.teacher.head, corpus.teacher.device
        self.vocab = torch.arange(len(head)) if draft_vocab is None else draft_vocab
        self.head = head[self.vocab.to(device)].to(self.dtype)
        self.place = torch.full((len(head),), -1, device=device)
        self.place[self.vocab.to(device)] = torch.arange(len(self.vocab), device=device)
        self.optimizer = torch.optim.AdamW(
            heads.module.parameters(), betas=(0.9, 0.95), weight_decay=0.0
        )
        self.progress = Progress()
        self.batch_size = min(settings.batch_size, len(corpus.training))

    def run(self, on_step: Callable[[Progress], bool] = lambda _: False) -> Progress:
        """Trains to the limits, or until `on_step` says to stop; then the state is kept.

        Raises OptionError if the loss is no longer a number.
        """
        if not self._resume():
            self.heads.initialise(self.corpus)
        progress, settings = self.progress, self.settings
        saved = time.perf_counter()
        while self.done() < 1:
            if progress.tokens >= settings.eval_tokens * len(progress.evaluations):
                self._evaluate_some()
            start = time.perf_counter()
            self._step()
            progress.seconds += time.perf_counter() - start
            if on_step(progress):
                break
            if time.perf_counter() - saved > settings.save_seconds:
                self._save()
                saved = time.perf_counter()
        if self.done() >= 1 and progress.evaluations[-1][0] < progress.tokens:
            self._evaluate_some()
        self._save()
        return progress

    def done(self) -> float:
        """The share of the run that is over."""
        progress, settings = self.progress, self.settings
        return max(progress.tokens / settings.max_tokens, progress.seconds / settings.max_seconds)

    @torch.no_grad()
    def evaluate(self, num_samples: int | None = None) -> Ranks:
        """Ranks of the right tokens on held-out text, over all tokens that the engine drafts from.

        num_samples: a first look at so many samples, over the loss's vocabulary; None for all.
        """
        ranks, kinds, samples = [], [], []
        all_tokens = self.heads.drafts_all_tokens and num_samples is None
        head = self.corpus.teacher.head.to(self.dtype) if all_tokens else self.head
        for index in self.corpus.held_out[:num_samples]:
            batch = self.corpus.batch([index])
            depths = self.heads.num_depths
            # The root is a token that the target wrote; every depth has one to be right about.
            first = max(int(batch.prompt_lens[0]) - 1, 0)
            rows = torch.arange(first, int(batch.lengths[0]) - depths - 1)
            outputs = self._predict(batch)[:, 0, rows].to(self.dtype)
            found = []
            for depth in range(depths):
                right = batch.tokens[0, rows + depth + 2]
                place = right if all_tokens else self.place[right]
                found.append(rank_of(outputs[depth] @ head.T, place).cpu())
            ranks.append(torch.stack(found))
            kinds += [self.corpus.text.kinds[index]] * len(rows)
            samples += [index] * len(rows)
        return Ranks(torch.cat(ranks, dim=1), tuple(kinds), tuple(samples))

    def _evaluate_some(self) -> None:
        ranks = self.evaluate(self.settings.eval_samples)
        self.progress.evaluations.append((self.progress.tokens, [ranks.top(n) for n in TOP]))

    def _step(self) -> None:
        progress = self.progress
        batch = self.corpus.batch(self._samples())
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * self._schedule()
        self.optimizer.zero_grad()
        loss = self._backward(batch)
        if not math.isfinite(loss):
            rate = self.settings.learning_rate
            raise bad_option("learning_rate", rate, "makes the loss infinite", "take a lower one")
        torch.nn.utils.clip_grad_norm_(self.heads.module.parameters(), _MAX_NORM)
        self.optimizer.step()
        progress.step += 1
        progress.tokens += int(batch.lengths.sum())
        progress.loss = loss if math.isnan(progress.loss) else 0.95 * progress.loss + 0.05 * loss
        progress.losses.append((progress.tokens, loss))

    def _samples(self) -> list[int]:
        """The samples of this step: every epoch goes through all of them in an order of its own."""
        training = self.corpus.training
        epoch, place = divmod(self.progress.step, len(training) // self.batch_size)
        order = torch.randperm(len(training), generator=self._generator(epoch)).tolist()
        chosen = order[place * self.batch_size : (place + 1) * self.batch_size]
        return [training[index] for index in chosen]

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.settings.seed * 1_000_003 + number)

    def _schedule(self) -> float:
        done = self.done()
        return min(1.0, (done + 1e-4) / _WARMUP) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    def _predict(self, batch: Batch) -> Tensor:
        device = self.head.device.type
        with torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32):
            hidden = batch.hidden.to(self.dtype)
            embeddings = self.corpus.embeddings(batch).to(self.dtype)
            return self.heads.module(hidden, embeddings)

    def _backward(self, batch: Batch) -> float:
        """Gradients of the loss; the logits of one depth are in memory at a time."""
        head = self._head_rows(batch)
        target = (batch.hidden.to(self.dtype) @ head.T).float().log_softmax(-1)
        outputs = self._predict(batch)
        leaf = outputs.detach().requires_grad_()
        total = 0.0
        for depth in range(self.heads.num_depths):
            rows, ahead = batch.inside(depth + 1), target.roll(-depth - 1, dims=1)
            drafted = (leaf[depth][rows].to(self.dtype) @ head.T).float().log_softmax(-1)
            loss = functional.kl_div(drafted, ahead[rows], log_target=True, reduction="batchmean")
            wanted = batch.hidden.roll(-depth - 1, dims=1)[rows]
            loss = loss + self.heads.own_loss(leaf[depth][rows], wanted)
            (_DEPTH_WEIGHT**depth * loss).backward()
            total += float(loss.detach()) / self.heads.num_depths
        outputs.backward(leaf.grad)
        return total

    def _head_rows(self, batch: Batch) -> Tensor:
        """Rows of the head for this step: the batch's own tokens, then random ones."""
        if len(self.vocab) <= self.settings.head_rows:
            return self.head
        priority = torch.rand(len(self.vocab), generator=self._generator(self.progress.step))
        own = self.place[batch.tokens.flatten()].cpu()
        priority[own[own >= 0]] += 1
        return self.head[priority.topk(self.settings.head_rows).indices.to(self.head.device)]

    def _identity(self) -> dict[str, Any]:
        vocab = int(self.vocab.sum()), len(self.vocab)
        text = self.corpus.text.digest()
        own = self.settings.identity() | {"text": text, "draft_vocab": vocab}
        return own | self.heads.identity()

    def _save(self) -> None:
        partial = self.file.with_suffix(".partial")
        state = {
            "identity": self._identity(),
            "progress": asdict(self.progress),
            "module": self.heads.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, partial)
        partial.replace(self.file)

    def _resume(self) -> bool:
        """Takes the state of an earlier run, if there is one.

        Raises OptionError if it is damaged or of another run.
        """
        if not self.file.exists():
            return False

        def refused(reason: str) -> Exception:
            way_out = f"remove {self.file} to begin again, or take another folder"
            return bad_option("out", str(self.file.parent), reason, way_out)

        try:
            state = torch.load(self.file, map_location=self.head.device, weights_only=True)
            identity, progress = state["identity"], Progress(**state["progress"])
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, TypeError):
            raise refused("holds a training state that is damaged") from None
        for name, value in self._identity().items():
            if identity.get(name) != value:
                before = identity.get(name)
                raise refused(f"was trained with {name} {before!r}, but this run has {value!r}")
        self.heads.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = progress
        return True
