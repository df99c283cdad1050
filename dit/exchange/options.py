"""Options that the commands of `dit.exchange` share, under this project's names and those of facebookresearch/DiT."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from dit.errors import ConfigError

Target = Annotated[
    str | None,
    typer.Argument(
        metavar="[RUN]", help="A run of runs/train, such as adaln_zero-0, a checkpoint file, or an exported directory."
    ),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option("--checkpoint", "--ckpt", help="A file with weights of a DiT, SiT or LightningDiT, in place of RUN."),
]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="The network of a file, such as SiT-XL/2 (default: found from the tensors; give it for a SiT)."
    ),
]
Vae = Annotated[
    str | None,
    typer.Option(
        metavar="DIRECTORY",
        help="The autoencoder: a directory in diffusers format, ema, mse, or a name on the hub (default: the run's).",
    ),
]
Key = Annotated[
    str, typer.Option(help="The key under which the file has its weights, such as ema or model (default: ema, if it is there).")
]
Step = Annotated[
    int | None, typer.Option(min=0, help="Take the run's kept checkpoint of this step (default: the run's final weights).")
]
Latents = Annotated[Path | None, typer.Option(help="Where the run's latents are, if they have moved.")]
Autoencoder = Annotated[Path | None, typer.Option(help="Where the run's autoencoder is, if it has moved.")]
Scratch = Annotated[Path, typer.Option(help="The folder in which runs keep their checkpoints.")]
ParamsFile = Annotated[
    Path, typer.Option("--params", help="A parameter file, which says how samples of a run are drawn and measured.")
]
Scheduler = Annotated[
    str | None,
    typer.Option(help="ddpm, ddim or dpmsolver++; for flows flow_euler or flow_heun (default: the study's, or ddpm)."),
]
Steps = Annotated[
    int | None, typer.Option("--steps", "--num-sampling-steps", min=1, help="Sampling steps (default: the study's, or 250).")
]
Spacing = Annotated[
    str | None,
    typer.Option(
        "--timestep-spacing", help="Which timesteps are visited: see docs/sampling.md (default: the study's, or auto)."
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option("--guidance-scale", "--cfg-scale", min=1, help="1 is no guidance (default: the study's, or 1.5)."),
]
GuidanceChannels = Annotated[
    str | None, typer.Option(help="How many latent channels are guided: a number, or all (default: the study's, or 3).")
]
Seed = Annotated[
    int | None, typer.Option("--seed", "--global-seed", min=0, help="The seed of the noise (default: the study's, or 0).")
]
BatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", "--per-proc-batch-size", min=1, help="Images at a time (default: the study's, or 32)."),
]
Precision = Annotated[
    str | None, typer.Option(help="Precision of network and decoder: fp32, bf16, fp16 or auto (default: the study's, or auto).")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps or auto (default: the study's, or auto).")]


def one(target: str | None, checkpoint: Path | None) -> str:
    """The source of the weights. Raises `ConfigError` unless exactly one of `target` and `checkpoint` is given."""
    if target is not None and checkpoint is None:
        return target
    if checkpoint is not None and target is None:
        return str(checkpoint)
    raise ConfigError("expected one of RUN and --checkpoint FILE: what to take the weights from")


def study(about: Mapping[str, Any], params: Path) -> dict[str, Any] | None:
    """How the study draws samples, if it trained the network; None for other networks, or without a parameter file."""
    from dit import config

    if not about.keys() & {"strategy", "checkpoint"} or not params.is_file():
        return None
    return config.load(params).evaluate.model_dump()


def given(**options: Any) -> dict[str, Any]:
    """The options that the user gave, without those that are None."""
    channels = options.get("guidance_channels")
    if channels is not None and channels != "all":
        if not channels.isdecimal():
            raise ConfigError(f"--guidance-channels {channels}; expected a number, or all")
        options["guidance_channels"] = int(channels)
    return {name: value for name, value in options.items() if value is not None}


def numbers(text: str | None) -> list[int] | None:
    """`"207,360"` -> [207, 360]. Raises `ConfigError` for anything else."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"--class-labels {text}; expected numbers with commas between, such as 207,360,387")
    return [int(part) for part in parts]


def words(settings: Any) -> str:
    """How samples were drawn, in words."""
    return f"{settings.steps} steps of {settings.scheduler}, guidance scale {settings.guidance_scale:g}, seed {settings.seed}"
