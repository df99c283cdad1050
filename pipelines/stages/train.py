"""Stage `train@<strategy>-<seed>`: one DiT, from one initialisation."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Annotated

import typer
from safetensors.torch import save_file

from dit import init
from dit.config import Params
from dit.data.latents import LatentStore
from dit.devices import make_deterministic, resolve_device
from dit.diffusion import Diffusion
from dit.distributed import Ranks, joined
from dit.training.kept import RunSettings
from dit.training.loop import Trainer
from dit.training.records import outcome
from pipelines.files import complete_directory, scratch
from pipelines.records.base import Timing
from pipelines.records.training import TRAIN, TrainRecord, TrainSettings
from pipelines.stages.entry import run_dvc_stage, run_key, strategy_of


def train(params: Params, strategy: str, seed: int) -> None:
    """Initialise, train, and write `runs/train/<strategy>-<seed>`: alone, or as one of a group of processes."""
    make_deterministic(params.train.threads, params.train.deterministic)
    with joined(resolve_device(params.train.device)) as ranks:
        train_on(ranks, params, strategy, seed)


def train_on(ranks: Ranks, params: Params, strategy: str, seed: int) -> None:
    """This rank's part of it."""
    device = ranks.device
    rules = strategy_of(params, strategy)
    settings = {
        "model": params.model.model_dump(mode="json"),
        "diffusion": params.diffusion.model_dump(mode="json"),
        "train": params.train.model_dump(mode="json"),
        "rules": rules.resolved,
    }
    key = run_key("train", [settings, device.type], strategy, seed)
    beside = {"processes", "parallel", "keep_checkpoints"}  # what a run may be resumed with another value of
    longer = beside if params.train.depends_on_length else {*beside, "steps"}
    resumable, shared = (
        run_key(
            "train", [{**settings, "train": params.train.model_dump(mode="json", exclude=keys)}, device.type], strategy, seed
        )
        for keys in (beside, longer)
    )
    store = LatentStore(Path("data/latents"))
    network = params.network(store.sizes)
    init.apply(network, rules, seed)
    trainer = Trainer(
        network,
        store,
        Diffusion(params.diffusion, device),
        params.train,
        label_dropout=params.model.label_dropout,
        seed=seed,
        scratch=scratch(resumable),
        ended=scratch(shared),
        settings=RunSettings(
            name=f"{strategy}-{seed}", seed=seed, model=params.model, diffusion=params.diffusion, train=params.train
        ),
        ranks=ranks,
    )
    started = time.monotonic()
    trainer.run(f"train {strategy}-{seed}")
    seconds = time.monotonic() - started
    ema = trainer.averaged_weights()
    if not ranks.is_main:
        return
    ended = outcome(
        trainer.records,
        trainer.divergence,
        steps_done=trainer.steps_done,
        parameters=sum(weight.numel() for weight in trainer.model.parameters()),
        target_second_moment=trainer.validation.target_second_moment,
    )
    record = TrainRecord(
        strategy=strategy, seed=seed, run_key=key, device=device.type, settings=TrainSettings(**settings), **vars(ended)
    )
    with complete_directory(TRAIN / f"{strategy}-{seed}") as out:
        save_file(ema, out / "ema.safetensors")
        trainer.records.write(out)
        record.write(out)
    trainer.forget()
    Timing(seconds=seconds, images_per_second=trainer.images_per_second, hostname=socket.gethostname()).write(scratch(key))
    print(f"train {strategy}-{seed}: {ended.sentence}, {trainer.images_per_second:.0f} images/s")


def main(strategy: str, seed: Annotated[int, typer.Argument(min=0)]) -> None:
    """Train one DiT from STRATEGY of params.yaml with SEED."""
    run_dvc_stage(lambda params: train(params, strategy, seed), "train")


if __name__ == "__main__":
    typer.run(main)
