"""The model card of an exported network: what the network is, how it was trained, what was measured, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dit.exchange.trained import TIMESTEP_LAYER, Trained
from dit.sections import EvaluateParams

SHOWN_CLASSES = 10
"""How many names of classes a card lists."""


@dataclass(frozen=True)
class Facts:
    """The facts that a card states; `timesteps` and `steps` as in `dit.exchange.pipeline.Exported`."""

    trained: Trained
    settings: EvaluateParams
    format: str
    timesteps: tuple[int, ...] | None
    steps: tuple[int, ...]


def card(facts: Facts) -> str:
    """The text of README.md, with the YAML header that model hubs read."""
    trained, about = facts.trained, facts.trained.about
    parameters = sum(weight.numel() for weight in trained.network.parameters() if weight.requires_grad)
    library = "diffusers" if facts.format == "diffusers" else "safetensors"
    named = ", ".join(trained.class_names[:SHOWN_CLASSES])
    more = f" and {len(trained.class_names) - SHOWN_CLASSES} more" if len(trained.class_names) > SHOWN_CLASSES else ""
    lines = [
        "---",
        f"library_name: {library}",
        "tags: [diffusion-transformer, class-conditional-image-generation]",
        "---",
        "",
        f"# {trained.name}",
        "",
        f"A {trained.model.name}, {parameters:,} trained parameters, for latents of {trained.network.latent_channels} x "
        f"{trained.network.latent_size} x {trained.network.latent_size}; it predicts {_prediction(trained)}.",
        "",
        "## Data",
        "",
        f"{trained.network.num_classes} classes: {named}{more}."
        + (f" Read from `{about['source']}`." if "source" in about else ""),
        "",
        "## Training",
        "",
        *_training(about),
        "",
        "## Metrics",
        "",
        *_metrics(about),
        "",
        "## How to load it",
        "",
        *(_pipeline(facts) if facts.format == "diffusers" else _own(facts)),
    ]
    return "\n".join(lines) + "\n"


def _prediction(trained: Trained) -> str:
    words = {"eps": "the noise", "x0": "the clean latent", "v": "v", "flow": "the velocity of a flow"}
    return words[trained.diffusion.objective] + (" and its variance" if trained.diffusion.learn_sigma else "")


def _training(about: Mapping[str, Any]) -> Iterator[str]:
    if not about.get("train") and not about.get("strategy"):
        yield "Not known: the file that it was read from does not say."
        return
    if about.get("strategy"):
        yield f"- Initialisation strategy: `{about['strategy']}`, seed {about.get('seed')}"
    if about.get("steps") is not None:
        yield f"- Optimiser steps: {about['steps']:,}; status: {about.get('status', 'unknown')}; weights: their average (EMA)"
    if about.get("rules"):
        yield f"- Rules of the strategy: `{json.dumps(about['rules'])}`"
    if about.get("train"):
        yield f"- Parameters: `{json.dumps(about['train'])}`"


def _metrics(about: Mapping[str, Any]) -> Iterator[str]:
    if about.get("validation_error") is not None:
        yield f"- Mean squared error on held-out latents: {about['validation_error']:.4g}"
    evaluation = about.get("evaluation")
    if evaluation:
        space = evaluation.get("features", {})
        against = evaluation.get("reference") or f"{evaluation.get('num_real')} validation images of the study"
        yield (
            f"- {evaluation.get('num_generated')} samples against {against}, in the features of {space.get('extractor')} "
            f"at {space.get('size')} pixels:"
        )
        for name, value in evaluation.get("metrics", {}).items():
            if value is not None and name != "validation_mse":
                yield f"  - {name.replace('_', ' ')}: {value:.4g}"
    if about.get("validation_error") is None and not evaluation:
        yield "None were recorded."


def _pipeline(facts: Facts) -> Iterator[str]:
    settings, diffusion = facts.settings, facts.trained.diffusion
    yield "```python"
    yield "import torch"
    yield "from diffusers import DiTPipeline"
    yield ""
    yield 'pipe = DiTPipeline.from_pretrained("PATH/TO/THIS/DIRECTORY")'
    if facts.timesteps is None:
        yield "for module in pipe.transformer.modules():  # the frequencies of timesteps that DiT was trained with"
        yield '    if type(module).__name__ == "Timesteps":'
        yield "        module.downscale_freq_shift = 0"
    yield f"images = pipe(class_labels=[0], guidance_scale={settings.guidance_scale}, num_inference_steps={settings.steps},"
    yield f"              generator=torch.manual_seed({settings.seed})).images"
    yield "```"
    yield ""
    if facts.timesteps is not None:
        yield (
            f"Use num_inference_steps = {' or '.join(map(str, facts.steps))} with the scheduler of this directory, and nothing "
            "else. diffusers' DiT embeds timesteps by other frequencies than the published one: exponents k / 127, not k / 128."
            f" So the first layer of the timestep MLP was solved for anew: it gives the same at the {len(facts.timesteps)} "
            f"timesteps of {diffusion.num_timesteps} that these visit, and not between them. The layer as it was trained is in "
            f"`{TIMESTEP_LAYER}`. For other steps export with other `--steps`, or with `--any-steps`."
        )
    else:
        yield (
            "Without the loop above the pipeline computes something else: diffusers' DiT embeds timesteps by other frequencies "
            "than the published DiT (exponents k / 127, not k / 128). With it, any scheduler and number of steps will do."
        )
    yield ""
    yield (
        f"Label 1000 means no class. `dit sample` of this directory starts sample i from the noise of "
        f'`dit.seeding.generator({settings.seed}, "sample", i)`; a list of such generators gives the pipeline the same. '
        f"Guidance in the pipeline acts on all channels."
    )


def _own(facts: Facts) -> Iterator[str]:
    yield "`model.safetensors` has the network's own names of tensors, `dit.json` says which network it is."
    yield ""
    yield "```python"
    yield "import json"
    yield "from safetensors.torch import load_file"
    yield "from dit import models"
    yield ""
    yield 'about = json.load(open("dit.json"))'
    yield 'options = {key: value for key, value in about["model"].items() if key not in ("name", "label_dropout")}'
    yield 'learn_sigma = about["diffusion"]["learn_sigma"]'
    yield 'network = models.build(about["model"]["name"], learn_sigma=learn_sigma, **about["sizes"], **options)'
    yield 'network.load_state_dict(load_file("model.safetensors"))'
    yield "```"
    yield ""
    yield (
        "`dit sample THIS_DIRECTORY` draws images from it. A latent z is normalised to `(z - shift) * scale`, by `normalize` "
        "in `dit.json`."
    )
