"""The commands `dit sample` and `dit export`: their options, and what is called with them. Torch is imported when one runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dit.errors import ConfigError

if TYPE_CHECKING:
    from dit.exchange.trained import Trained, Where

Target = Annotated[
    str | None,
    typer.Argument(
        metavar="[RUN]", help="A run such as adaln_zero-0 or its folder, a checkpoint file, or an exported directory."
    ),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option("--checkpoint", "--ckpt", help="A file with weights of a DiT, SiT or LightningDiT, in place of RUN."),
]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Of a file: its network, such as SiT-XL/2. [default: found; a SiT is not told from a DiT]"
    ),
]
Vae = Annotated[
    str | None,
    typer.Option(
        metavar="DIRECTORY",
        help="The autoencoder: a directory in diffusers format, ema, mse, or a name on the hub. [default: the run's]",
    ),
]
Key = Annotated[
    str, typer.Option(help="Of a file: where in it the weights are, such as ema or model. [default: found, ema first]")
]
Step = Annotated[int | None, typer.Option(min=0, help="Of a run: the kept checkpoint of this step. [default: the end]")]
Latents = Annotated[Path | None, typer.Option(help="Where the run's latents are, if they have moved.")]
Autoencoder = Annotated[Path | None, typer.Option(help="Where the run's autoencoder is, if it has moved.")]
Scratch = Annotated[Path, typer.Option(help="The folder in which runs keep their checkpoints.")]
ParamsFile = Annotated[Path, typer.Option("--params", help="Whose section `evaluate` says how samples are drawn, for a run.")]
Scheduler = Annotated[
    str | None, typer.Option(help="ddpm, ddim, dpmsolver++; flow_euler, flow_heun. [default: the study's, or ddpm]")
]
Steps = Annotated[
    int | None, typer.Option("--steps", "--num-sampling-steps", min=1, help="Sampling steps. [default: the study's, or 250]")
]
Spacing = Annotated[
    str | None, typer.Option("--timestep-spacing", help="See docs/sampling.md. [default: the study's, or auto]")
]
Guidance = Annotated[
    float | None,
    typer.Option("--guidance-scale", "--cfg-scale", min=1, help="1 is no guidance. [default: the study's, or 1.5]"),
]
GuidanceChannels = Annotated[
    str | None, typer.Option(help="Latent channels that guidance acts on: a number, or all. [default: the study's, or 3]")
]
Seed = Annotated[int | None, typer.Option("--seed", "--global-seed", min=0, help="Of the noise. [default: the study's, or 0]")]
BatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", "--per-proc-batch-size", min=1, help="Images at a time. [default: the study's, or 32]"),
]
Precision = Annotated[str | None, typer.Option(help="Of the network: fp32, bf16, fp16, auto. [default: the study's, or auto]")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps, auto. [default: the study's, or auto]")]


def sample(
    target: Target = None,
    checkpoint: Checkpoint = None,
    model: Model = None,
    vae: Vae = None,
    output: Annotated[
        Path,
        typer.Option("--output", "--sample-dir", help="NAME.npz: an archive; NAME.png: a grid; else a folder of PNG files."),
    ] = Path("samples"),
    num_samples: Annotated[int, typer.Option("--num-samples", "--num-fid-samples", min=1, help="How many images.")] = 16,
    class_labels: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Classes, in turn, such as 207,360,387. [default: all classes]")
    ] = None,
    scheduler: Scheduler = None,
    steps: Steps = None,
    timestep_spacing: Spacing = None,
    guidance_scale: Guidance = None,
    guidance_channels: GuidanceChannels = None,
    seed: Seed = None,
    batch_size: BatchSize = None,
    precision: Precision = None,
    device: Device = None,
    key: Key = "",
    step: Step = None,
    latents: Latents = None,
    autoencoder: Autoencoder = None,
    scratch: Scratch = Path(".scratch"),
    params: ParamsFile = Path("params.yaml"),
) -> None:
    """Draw images from a run of a study, a published checkpoint, or an exported directory.

    With torchrun, several GPUs share the work. Image i is the same whatever the batch size and the number of GPUs.
    """
    from dit.devices import make_deterministic, resolve_device
    from dit.distributed import joined
    from dit.exchange.drawing import images, labels_for, save, settings_for

    trained = _trained(target, checkpoint, _where(model, vae, key, step, latents, autoencoder, scratch))
    given = _given(
        scheduler=scheduler,
        steps=steps,
        timestep_spacing=timestep_spacing,
        guidance_scale=guidance_scale,
        guidance_channels=guidance_channels,
        seed=seed,
        batch_size=batch_size,
        precision=precision,
        device=device,
        num_samples=max(2, num_samples),
    )
    settings = settings_for(trained, _study(trained, params), given)
    labels = labels_for(trained, num_samples, _numbers(class_labels))
    make_deterministic(settings.threads)
    with joined(resolve_device(settings.device)) as ranks:
        batches = images(trained, labels, settings, ranks)
        if ranks.is_main:
            save(batches, num_samples, output)
            print(f"{num_samples} images of {trained.name} are in {output}: {_words(settings)}")
        else:
            for _ in batches:
                pass


def export(
    target: Target = None,
    output: Annotated[Path | None, typer.Argument(metavar="DIRECTORY", help="A new directory.")] = None,
    checkpoint: Checkpoint = None,
    format: Annotated[str, typer.Option(help="diffusers: a DiTPipeline; safetensors: of any network.")] = "diffusers",
    any_steps: Annotated[
        bool,
        typer.Option("--any-steps", help="Keep every tensor as trained; the pipeline then needs three lines of the README."),
    ] = False,
    model: Model = None,
    vae: Vae = None,
    scheduler: Scheduler = None,
    steps: Steps = None,
    timestep_spacing: Spacing = None,
    guidance_scale: Guidance = None,
    seed: Seed = None,
    key: Key = "",
    step: Step = None,
    latents: Latents = None,
    autoencoder: Autoencoder = None,
    scratch: Scratch = Path(".scratch"),
    params: ParamsFile = Path("params.yaml"),
) -> None:
    """Write a trained network as a directory for others, with a model card: see docs/checkpoints.md.

    DiTPipeline.from_pretrained(DIRECTORY) of diffusers loads it, and gives the images of `dit sample DIRECTORY`, with the same
    scheduler, steps, guidance and noise.
    """
    if checkpoint is not None and output is None and target is not None:
        target, output = None, Path(target)
    if output is None:
        raise ConfigError("no directory to write; expected `dit export RUN DIRECTORY`")
    if format not in ("diffusers", "safetensors"):
        raise ConfigError(f"--format {format}; expected diffusers or safetensors")
    from dit.exchange.drawing import EXPORT_STEPS, settings_for
    from dit.exchange.pipeline import export_pipeline, export_safetensors

    trained = _trained(target, checkpoint, _where(model, vae, key, step, latents, autoencoder, scratch))
    given = _given(
        scheduler=scheduler,
        steps=steps,
        timestep_spacing=timestep_spacing,
        guidance_scale=guidance_scale,
        seed=seed,
    )
    settings = settings_for(trained, _study(trained, params), given)
    if format == "diffusers" and settings.scheduler == "ddpm" and scheduler is None:
        settings = settings_for(trained, _study(trained, params), {**EXPORT_STEPS, **given})
    if format == "safetensors":
        export_safetensors(trained, output, settings)
        print(f"{output}: {trained.name} as safetensors, with dit.json and README.md")
        return
    exported = export_pipeline(trained, output, settings, any_steps)
    print(f"{output}: {trained.name} as a DiTPipeline of diffusers, with README.md")
    if exported.timesteps is None:
        print("Its timesteps need the three lines of README.md, with which any scheduler and number of steps will do.")
    else:
        counts = " or ".join(map(str, exported.steps))
        print(f"It gives our samples with num_inference_steps = {counts} and its own scheduler; for others see --any-steps.")


def _where(
    model: str | None,
    vae: str | None,
    key: str,
    step: int | None,
    latents: Path | None,
    autoencoder: Path | None,
    scratch: Path,
) -> Where:
    from dit.audit.files import Reading
    from dit.exchange.trained import Where

    return Where(model, vae, autoencoder, latents, step, scratch, Reading(key=key))


def _trained(target: str | None, checkpoint: Path | None, where: Where) -> Trained:
    from dit.exchange.trained import load, of_file

    if (target is None) == (checkpoint is None):
        raise ConfigError("expected one of RUN and --checkpoint FILE: what to take the weights from")
    return of_file(checkpoint, where) if checkpoint is not None else load(str(target), where)


def _study(trained: Trained, params: Path) -> dict[str, Any] | None:
    """How the study draws samples, for a network that it trained; None for others, or where there is no parameter file."""
    from dit import config

    if not trained.about.keys() & {"strategy", "checkpoint"} or not params.is_file():
        return None
    return config.load(params).evaluate.model_dump()


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    channels = options.get("guidance_channels")
    if channels is not None and channels != "all":
        if not channels.isdecimal():
            raise ConfigError(f"--guidance-channels {channels}; expected a number, or all")
        options["guidance_channels"] = int(channels)
    return {name: value for name, value in options.items() if value is not None}


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"--class-labels {text}; expected numbers with commas between, such as 207,360,387")
    return [int(part) for part in parts]


def _words(settings: Any) -> str:
    return f"{settings.steps} steps of {settings.scheduler}, guidance scale {settings.guidance_scale:g}, seed {settings.seed}"
