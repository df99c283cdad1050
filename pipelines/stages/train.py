"""Stage `train@<strategy>-<seed>`: one DiT, from one initialisation."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from dit import init
from dit.config import Params
from dit.data.latents import LatentStore
from dit.devices import make_deterministic, resolve_device
from dit.diffusion import Diffusion
from dit.distributed import Ranks, joined
from dit.training.kept import RunSettings
from dit.training.loop import Trainer
from pipelines.design import Item
from pipelines.files import complete_directory, scratch
from pipelines.records.base import Timing
from pipelines.records.training import RunningRecord, TrainRecord, TrainSettings
from pipelines.stages.entry import run_dvc_stage, run_key


def train(params: Params, item: Item) -> None:
    """Initialise, train, and write `runs/train/<run>`: alone, or as one of a group of processes."""
    make_deterministic(params.train.threads, params.train.deterministic)
    with joined(resolve_device(params.train.device)) as ranks:
        train_on(ranks, params, item)


def train_on(ranks: Ranks, params: Params, item: Item) -> None:
    """Train on this rank; the main rank writes."""
    device = ranks.device
    strategy, seed = item.strategy, item.seed or 0
    rules = params.strategies[strategy]
    settings = {
        "model": params.model.model_dump(mode="json"),
        "diffusion": params.diffusion.model_dump(mode="json"),
        "train": params.train.model_dump(mode="json"),
        "rules": rules.resolved,
    }
    key = run_key(item, [settings, device.type])
    resumable, ended = (scratch(run_key(item, [each, device.type])) for each in _shared(params, settings))
    store = LatentStore(item.inputs["latents"])
    network = params.network(store.sizes)
    init.apply(network, rules, seed)
    trainer = Trainer(
        network,
        store,
        Diffusion(params.diffusion, device),
        params.train,
        label_dropout=params.model.label_dropout,
        seed=seed,
        scratch=resumable,
        ended=ended,
        settings=RunSettings(name=item.key, seed=seed, model=params.model, diffusion=params.diffusion, train=params.train),
        ranks=ranks,
    )
    if ranks.is_main:
        RunningRecord(
            run=item.key,
            run_key=key,
            folder=str(Path.cwd()),
            parameters=sum(weight.numel() for weight in network.parameters()),
            device=device.type,
            settings=TrainSettings(**settings),
        ).write(resumable)
    started = time.monotonic()
    trainer.run(f"train {item.key}")
    seconds = time.monotonic() - started
    ema = trainer.averaged_weights()
    if not ranks.is_main:
        return
    end = trainer.outcome()
    record = TrainRecord(
        strategy=strategy, seed=seed, run_key=key, device=device.type, settings=TrainSettings(**settings), **vars(end)
    )
    with complete_directory(item.out) as out:
        save_file(ema, out / "ema.safetensors")
        trainer.records.write(out)
        record.write(out)
    trainer.forget()
    (resumable / RunningRecord.FILE).unlink()
    Timing(seconds=seconds, images_per_second=trainer.images_per_second, hostname=socket.gethostname()).write(scratch(key))
    print(f"train {item.key}: {end.sentence}, {trainer.images_per_second:.0f} images/s")


def _shared(params: Params, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Settings that two runs must share to continue from each other's checkpoints: of equal length, and of any length."""
    beside = {"processes", "parallel", "keep_checkpoints"}
    for keys in (beside, beside if params.train.depends_on_length else {*beside, "steps"}):
        yield {**settings, "train": params.train.model_dump(mode="json", exclude=keys)}


if __name__ == "__main__":
    run_dvc_stage(train, "train", "train")
