"""The training loop: takes batches, which depend on seed and step alone, and makes EMA weights and records."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dit import checkpoint
from dit.analysis.diagnostics import gradient_noise
from dit.data.batches import Batches
from dit.data.latents import LatentStore
from dit.devices import name_of, resolve_precision
from dit.diffusion import Batch, Diffusion
from dit.distributed import Ranks, restore, whole
from dit.errors import ConfigError
from dit.models import backbone_of, backend_for
from dit.optim.ema import EMA
from dit.optim.fused import unserved
from dit.optim.schedule import learning_rate
from dit.progress import progress
from dit.sections import TrainParams
from dit.training.diagnosis import Diagnosis
from dit.training.engines import ENGINES
from dit.training.growing import GrowingTables
from dit.training.kept import ENDED, Keeper, KeptRun, RunSettings, Shelf, describe, digest
from dit.training.records import Divergence, Outcome, Records, outcome
from dit.training.stability import Observation, Stability, observe
from dit.training.validation import Validation

EARLY_DIAGNOSES = 5
"""Number of first optimiser steps that are all diagnosed, since roles wake up in them."""

NOISE_PART = 4
"""A diagnosed step estimates its gradient noise: it compares its gradient with that of every fourth sample of the batch."""


class Trainer:
    """One run: a network whose weights are set, its data, and all state that a checkpoint holds.

    The folder `scratch` holds the checkpoint and belongs to this run alone. After the run, `ema` holds the averaged weights,
    `records` the measurements and events, and `divergence` is None unless a value that was not finite stopped the run.
    `settings` describe the run for a continuation from one of its kept checkpoints. Runs that differ only in length share the
    folder `ended`: a run that keeps its last checkpoint leaves it there for a longer run.
    """

    def __init__(
        self,
        model: nn.Module,
        store: LatentStore,
        diffusion: Diffusion,
        params: TrainParams,
        *,
        label_dropout: float,
        seed: int,
        scratch: Path,
        ended: Path | None = None,
        settings: RunSettings | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks or Ranks(diffusion.device)
        self.ranks.per_rank(params.batch_size, "train.batch_size")
        self.sharded = self.ranks.grouped and params.parallel == "fsdp"
        self.model = model if self.sharded else model.to(diffusion.device)
        self.ranks.broadcast(self.model.state_dict().values())
        self.diffusion = diffusion
        self.params = params
        self.scratch = scratch
        self.precision = resolve_precision(params.precision, diffusion.device)
        self.batches = Batches(
            store, diffusion, batch_size=params.batch_size, label_dropout=label_dropout, seed=seed, ranks=self.ranks
        )
        self.validation = Validation(store, diffusion, params.validation, self.ranks)
        self.backend = backend_for(
            model, params.backend, diffusion.device, self.precision, "train", self.sharded, unserved(params.optimizer)
        )
        if self.sharded:
            blocks = [block.module for block in backbone_of(model).blocks(model)]
            self.ranks.shard(self.model, blocks, self.precision, compiled=self.backend == "compiled")
        self.ema = EMA(self.model, params.ema_decay)
        engine = ENGINES[self.backend]
        self.engine = engine(self.model, diffusion, params, self.ema, self.ranks, self.precision)
        self.diagnosis = Diagnosis(self.model, self.engine, diffusion, self.precision, params.gradient_clip)
        self.records = Records()
        self.growing = GrowingTables(scratch)
        self.stability = Stability(self.validation.target_second_moment)
        self.divergence: Divergence | None = None
        self.steps_done = 0
        self.last_step = params.steps
        self.description = ""
        self.ended = Shelf(ended / ENDED) if ended is not None and "last" in params.keep_checkpoints else None
        self.keeper = Keeper(scratch, self._described(settings, store))
        self.images_per_second = math.nan
        self._pending: list[Tensor] = []

    def _described(self, settings: RunSettings | None, store: LatentStore) -> KeptRun | None:
        if settings is None:
            return None
        return KeptRun(
            settings=settings,
            sizes=store.sizes,
            latents=str(store.store.directory),
            latents_digest=digest(store),
            device=self.diffusion.device.type,
            precision=name_of(self.precision),
            backend=self.backend,
            processes=self.ranks.size,
            torch=torch.__version__,
        )

    def outcome(self) -> Outcome:
        """How the run ended."""
        return outcome(
            self.records,
            self.divergence,
            steps_done=self.steps_done,
            parameters=sum(weight.numel() for weight in self.model.parameters()),
            target_second_moment=self.validation.target_second_moment,
        )

    def averaged_weights(self) -> dict[str, Tensor]:
        """The averaged weights on the host, by name in the model. All ranks must call this; only the main rank gets tensors."""
        return cast("dict[str, Tensor]", self.ranks.gather_state(self.ema.tensors))

    def run(self, description: str) -> None:
        """Train from the last checkpoint, or from the start, to the end, to divergence, or to a collapse that ends the run."""
        self._resume(description)
        self.go_on(description)

    def go_on(self, description: str) -> None:
        """Train from the current state to `last_step`, to divergence, or to a collapse that ends the run."""
        self.description = description
        first, started = self.steps_done, time.monotonic()
        with progress(self.last_step, description, "step", done=first, shown=self.ranks.is_main) as bar:
            while self.steps_done < self.last_step and not self._ended_early:
                step = self.steps_done
                if step > first and self._checkpoint_due(step):
                    self._save()
                if self._validation_due(step):
                    self._validate(step)
                    if self.divergence:
                        break
                self._train(step)
                self.steps_done += 1
                if self._reading_due(step):
                    bar.set_postfix_str(f"mse {self._read_losses():.4f}", refresh=False)
                bar.update()
        self.images_per_second = (self.steps_done - first) * self.params.batch_size / (time.monotonic() - started)
        if self.ended and not self._ended_early:
            self._save_last(self.ended)
        if not self.divergence:
            self._validate(self.steps_done)

    @property
    def _ended_early(self) -> bool:
        return self.divergence is not None or (self.params.stop_on_collapse and self.stability.phase == "collapse")

    def forget(self) -> None:
        """Remove the files that an ended run no longer needs. Call it when the results are on disk. Kept checkpoints stay."""
        if self.ranks.is_main:
            checkpoint.remove(self.scratch)
            self.growing.remove()
            self.keeper.forget()

    def _train(self, step: int) -> None:
        batch = self.batches(step)
        diagnosed = self._diagnosis_due(step)
        of_part = self._gradient_norm_of_part(batch) if diagnosed else None
        losses = self.engine.gradients(batch)
        gradient_norm = self.engine.gradient_norm()
        self._pending.append(torch.cat([losses, whole(gradient_norm)[None]]))
        if diagnosed:
            self._diagnosed_update(step, batch, gradient_norm, of_part)
        else:
            self._update(step, gradient_norm)

    def _update(self, step: int, gradient_norm: Tensor) -> None:
        self.engine.step(learning_rate(self.params, step), gradient_norm)

    def _diagnosis_due(self, step: int) -> bool:
        return not self.sharded and (step < EARLY_DIAGNOSES or step % self.params.diagnose_every == 0)

    def _diagnosed_update(self, step: int, batch: Batch, gradient_norm: Tensor, of_part: Tensor | None) -> None:
        """Take the step, and record its diagnosis, which does not change the results of the run."""
        limit = self.params.gradient_clip
        everyone = Batch(*(self.ranks.gather(rows, self.params.batch_size) for rows in vars(batch).values()))
        clipped_share = None if limit is None else self.stability.clipped_share(limit)
        found = self.diagnosis(everyone, gradient_norm, clipped_share, lambda: self._update(step, gradient_norm))
        self.records.stability += [{"step": step, **vars(state)} for state in found.blocks]
        self.records.diagnostics += [{"step": step, **state._asdict()} for state in found.roles]
        if of_part is not None:
            whole_norm, part_norm = torch.stack([gradient_norm, of_part]).tolist()
            noise = gradient_noise(whole_norm, part_norm, self.params.batch_size, self._part_size)
            self.records.gradient_noise.append({"step": step, **vars(noise)})

    @property
    def _part_size(self) -> int:
        return len(range(0, self.params.batch_size, NOISE_PART))

    def _gradient_norm_of_part(self, batch: Batch) -> Tensor | None:
        """The norm of the gradient of every fourth sample of the batch of all ranks; None for a batch of one sample."""
        if self._part_size == self.params.batch_size:
            return None
        own = batch.rows(slice(-self.ranks.local_slice(self.params.batch_size).start % NOISE_PART, None, NOISE_PART))
        share = len(own.labels) * self.ranks.size / self._part_size  # 0 if the whole part is on other ranks
        return self.engine.gradient_norm_of(own if share else batch.first(1), share)

    def _reading_due(self, step: int) -> bool:
        """Whether losses are read after `step`. Otherwise they stay on the device, which then does not wait for the host."""
        after = step + 1
        return (
            step % self.params.log_every == 0
            or self._validation_due(after)
            or self._diagnosis_due(after)  # a diagnosis records the share of clipped steps before it
            or after == self.last_step
            or self._checkpoint_due(after)
        )

    def _checkpoint_due(self, step: int) -> bool:
        return step % self.params.checkpoint_every == 0 or step in self.params.keep_checkpoints

    def _read_losses(self) -> float:
        """Record the losses since the last reading, and a divergence if one is not finite. Returns the last error."""
        mse = math.nan
        first = self.steps_done - len(self._pending)
        losses = self.ranks.mean(torch.stack(self._pending)).tolist()
        for step, (total, mse, gradient_norm) in enumerate(losses, start=first):
            if not math.isfinite(total):
                self._diverged(Divergence(step, "loss", repr(total)))
                break
            seen = Observation(step, total, mse, gradient_norm, learning_rate(self.params, step))
            if step % self.params.log_every == 0:
                self.records.metrics.append(asdict(seen))
            self._judge(seen)
        self._pending = []
        self._show_progress()
        return mse

    def _judge(self, seen: Observation) -> None:
        """Record what this step shows about the stability of the run."""
        self.stability, event, kept = observe(self.stability, seen)
        self.records.spikes += kept
        if event is not None:
            self.records.events.append(asdict(event))
            if self.ranks.is_main:
                self._tell(self.keeper.judged(event, self._collapses))

    @property
    def _collapses(self) -> int:
        return sum(event["kind"] == "collapse" for event in self.records.events)

    def _diverged(self, divergence: Divergence) -> None:
        self.divergence = divergence
        if self.ranks.is_main and not self._collapses:
            self._tell(self.keeper.ending(divergence.step, "divergence"))

    def _tell(self, line: str) -> None:
        if line:
            print(f"{self.description}: {line}", flush=True)

    def _validation_due(self, step: int) -> bool:
        """Whether validation is due: at powers of two first, as strategies differ most early, and then at equal intervals."""
        every = self.params.validate_every
        return step % every == 0 or (step < every and step.bit_count() == 1)

    def _validate(self, step: int) -> None:
        self.model.eval()
        score = self.validation(self.model, self.precision)
        with self.ema.applied():
            averaged = self.validation(self.model, self.precision)
        self.model.train()
        for weights, measured in (("model", score), ("ema", averaged)):
            buckets = {f"mse_t{index}": mse for index, mse in enumerate(measured.by_bucket)}
            self.records.validation.append({"step": step, "weights": weights, "mse": measured.mse, **buckets})
            if not math.isfinite(measured.mse) and not self.divergence:
                self._diverged(Divergence(step, f"validation_mse of the {weights} weights", repr(measured.mse)))
        self._show_progress()

    def _show_progress(self) -> None:
        if self.ranks.is_main:
            self.growing.update(self.records)

    def _save(self) -> None:
        """Write a checkpoint; all ranks call this. Any number of ranks can read it, with DDP or FSDP."""
        state = self._state()
        if self.ranks.is_main:
            checkpoint.save(self.scratch, state)
            self.keeper.saved(self.steps_done, self.steps_done in self.params.keep_checkpoints)

    def _save_last(self, shelf: Shelf) -> None:
        """Keep the state of a finished run before its last validation, as a longer run may not validate at this step."""
        state = self._state()
        if self.ranks.is_main:
            checkpoint.save(self.scratch, state)
            shelf.only(self.steps_done, self.scratch)
            describe(shelf, self.keeper.run)

    def _state(self) -> dict[str, Any]:
        gathered: dict[str, Any] = self.ranks.gather_state(
            {
                "steps_done": self.steps_done,
                "model": self.model.state_dict(),
                "ema": self.ema.tensors,
                "optimizer": self.engine.state_dict(),
                "records": vars(self.records),
                "stability": self.stability.state_dict(),
            }
        )
        return gathered

    def restore(self, state: dict[str, Any]) -> None:
        """Restore all state that the rest of the run depends on, from the state in a checkpoint."""
        self.steps_done = state["steps_done"]
        restore(self.model.state_dict(), state["model"])
        restore(self.ema.tensors, state["ema"])
        self.engine.load_state_dict(state["optimizer"])
        self.records = Records(**state["records"])
        self.stability = Stability.from_state_dict(state["stability"])

    def _resume(self, description: str) -> None:
        host = torch.device("cpu")  # so that no device has to hold all of a sharded network
        state, where = checkpoint.load(self.scratch, host), ""
        if state is None and self.ended and (shorter := max(self.ended.steps(), default=self.last_step)) < self.last_step:
            state, where = checkpoint.load(self.ended.path(shorter), host), ", from the end of a shorter run"
        seen = torch.tensor([state["steps_done"] if state else 0], device=self.diffusion.device)
        if len(steps := self.ranks.gather(seen, self.ranks.size).unique()) > 1:
            raise ConfigError(
                f"{self.scratch}: processes see checkpoints of different steps, {steps.tolist()}; "
                "all hosts must share the folder of checkpoints"
            )
        if state is not None:
            self.restore(state)
            if self.ranks.is_main:
                print(f"{description}: resumed at step {self.steps_done}{where}")
