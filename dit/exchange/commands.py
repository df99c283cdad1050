"""The commands `dit sample` and `dit export`: their options and the calls behind them. Torch is imported only in a command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dit.errors import ConfigError
from dit.exchange import options as opts


def sample(
    target: opts.Target = None,
    checkpoint: opts.Checkpoint = None,
    model: opts.Model = None,
    vae: opts.Vae = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "--sample-dir",
            help="NAME.npz writes an archive, NAME.png a grid, any other name a folder of PNG files.",
        ),
    ] = Path("samples"),
    num_samples: Annotated[int, typer.Option("--num-samples", "--num-fid-samples", min=1, help="How many images.")] = 16,
    class_labels: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Classes to draw in turn, such as 207,360,387 (default: all classes).")
    ] = None,
    scheduler: opts.Scheduler = None,
    steps: opts.Steps = None,
    timestep_spacing: opts.Spacing = None,
    guidance_scale: opts.Guidance = None,
    guidance_channels: opts.GuidanceChannels = None,
    seed: opts.Seed = None,
    batch_size: opts.BatchSize = None,
    precision: opts.Precision = None,
    device: opts.Device = None,
    key: opts.Key = "",
    step: opts.Step = None,
    latents: opts.Latents = None,
    autoencoder: opts.Autoencoder = None,
    scratch: opts.Scratch = Path(".scratch"),
    params: opts.ParamsFile = Path("params.yaml"),
) -> None:
    """Draw images from a run of a study, a published checkpoint, or an exported directory.

    Started by torchrun, it uses several GPUs. Image i of a seed is the same for every batch size and number of GPUs.
    """
    from dit.devices import make_deterministic, resolve_device
    from dit.distributed import joined
    from dit.exchange.drawing import check_output, images, labels_for, save, settings_for
    from dit.exchange.trained import Where, load

    where = Where.of(model, vae, key, step, latents, autoencoder, scratch)
    trained = load(opts.one(target, checkpoint), where)
    given = opts.given(
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
    settings = settings_for(trained, opts.study(trained.about, params), given)
    labels = labels_for(trained, num_samples, opts.numbers(class_labels))
    check_output(output)
    make_deterministic(settings.threads)
    with joined(resolve_device(settings.device)) as ranks:
        batches = images(trained, labels, settings, ranks)
        if ranks.is_main:
            save(batches, num_samples, output)
            print(f"{num_samples} images of {trained.name} are in {output}: {opts.words(settings)}")
        else:
            for _ in batches:
                pass


def export(
    target: opts.Target = None,
    output: Annotated[Path | None, typer.Argument(metavar="DIRECTORY", help="A new directory.")] = None,
    checkpoint: opts.Checkpoint = None,
    format: Annotated[
        str, typer.Option(help="diffusers writes a DiTPipeline; safetensors works for any network.")
    ] = "diffusers",
    any_steps: Annotated[
        bool,
        typer.Option(
            "--any-steps", help="Keep every tensor as trained; to use the pipeline, you then need three lines from its README."
        ),
    ] = False,
    model: opts.Model = None,
    vae: opts.Vae = None,
    scheduler: opts.Scheduler = None,
    steps: opts.Steps = None,
    timestep_spacing: opts.Spacing = None,
    guidance_scale: opts.Guidance = None,
    seed: opts.Seed = None,
    key: opts.Key = "",
    step: opts.Step = None,
    latents: opts.Latents = None,
    autoencoder: opts.Autoencoder = None,
    scratch: opts.Scratch = Path(".scratch"),
    params: opts.ParamsFile = Path("params.yaml"),
) -> None:
    """Write a trained network as a directory that other programs can read, with a model card: see docs/checkpoints.md.

    DiTPipeline.from_pretrained(DIRECTORY) of diffusers loads it, and gives the images of `dit sample DIRECTORY`, with the same
    scheduler, steps, guidance and noise.
    """
    if checkpoint is not None and output is None:
        target, output = None, None if target is None else Path(target)
    if output is None:
        raise ConfigError("no directory to write; expected `dit export RUN DIRECTORY`")
    if format not in ("diffusers", "safetensors"):
        raise ConfigError(f"--format {format}; expected diffusers or safetensors")
    from dit.exchange.drawing import EXPORT_STEPS, settings_for
    from dit.exchange.pipeline import export_pipeline, export_safetensors
    from dit.exchange.trained import Where, load

    where = Where.of(model, vae, key, step, latents, autoencoder, scratch)
    trained = load(opts.one(target, checkpoint), where)
    given = opts.given(
        scheduler=scheduler,
        steps=steps,
        timestep_spacing=timestep_spacing,
        guidance_scale=guidance_scale,
        seed=seed,
    )
    settings = settings_for(trained, opts.study(trained.about, params), given)
    if format == "diffusers" and settings.scheduler == "ddpm" and scheduler is None:
        settings = settings_for(trained, opts.study(trained.about, params), {**EXPORT_STEPS, **given})
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
