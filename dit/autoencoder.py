"""The autoencoder between pixels and latents: trained on the study's images or loaded, measured, and used to encode and decode.

It is diffusers' `AutoencoderKL`, the autoencoder of Rombach et al. (2022), "High-Resolution Image Synthesis with Latent
Diffusion Models". Pixels are mapped from 0..255 to -1..1, as there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from dit import checkpoint, checksums
from dit.devices import autocast, resolve_device, send
from dit.errors import ConfigError, DataError, InputError
from dit.fused.encoder import FusedEncoder
from dit.progress import progress
from dit.sections import PretrainedAutoencoder, TrainedAutoencoder
from dit.seeding import derive_seed, generator

MODEL = "model"
LAYERS_PER_BLOCK = 1
MAX_NORM_GROUPS = 8
"""Of group normalisation: the largest number up to this one that divides all widths."""
BATCH_SIZE = 16
"""Of reconstructions; it bounds memory, and results do not depend on it beyond rounding."""
MEASURED_IMAGES = 1024
"""Reconstructions are measured on this many validation images at most, evenly spaced."""
CHECKPOINT_EVERY = 250
"""Steps between checkpoints; the result does not depend on it."""

MAX_PSNR = 10 * math.log10(12 * 255**2)
"""58.9 dB, that of an error of rounding to whole grey values (variance 1/12): what an exact reconstruction counts as."""
SHOWN, SHOWN_PER_ROW, SHOWN_SIZE = 32, 4, 96
"""The picture: pairs, pairs in a row, and the pixels that small images are enlarged to at most."""


def make_autoencoder(params: TrainedAutoencoder | PretrainedAutoencoder, images: np.ndarray, scratch: Path) -> AutoencoderKL:
    """The autoencoder that `params` asks for, in eval mode, on its device; it may be trained on `images` (N, H, W, 3) uint8.

    `scratch` holds the checkpoint of the training, and belongs to it alone.
    """
    if isinstance(params, PretrainedAutoencoder):
        return load_pretrained(params).to(resolve_device(params.device))
    return train(params, images, scratch)


def build(params: TrainedAutoencoder, size: int) -> AutoencoderKL:
    """A small `AutoencoderKL` for images of `size` pixels, with diffusers' weights drawn from `params.seed`."""
    groups = max(g for g in range(1, MAX_NORM_GROUPS + 1) if math.gcd(*params.channels) % g == 0)
    levels = len(params.channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("autoencoder", params.seed))
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(params.channels),
            layers_per_block=LAYERS_PER_BLOCK,
            latent_channels=params.latent_channels,
            norm_num_groups=groups,
            sample_size=size,
        )


def train(params: TrainedAutoencoder, images: np.ndarray, scratch: Path) -> AutoencoderKL:
    """Train on `images` (N, size, size, 3) uint8 and their mirror images: Adam, its learning rate falling to zero as a cosine.

    It goes on from the checkpoint in `scratch`, if there is one, and ends as if it had never stopped. Raises `ConfigError`
    where the loss stops being finite.
    """
    device = resolve_device(params.device)
    autoencoder = build(params, images.shape[1]).to(device).train()
    optimiser = torch.optim.Adam(autoencoder.parameters(), lr=params.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, params.steps)
    state = {"model": autoencoder, "optimiser": optimiser, "schedule": schedule}
    first = 0
    if saved := checkpoint.load(scratch, device):
        first = saved["steps_done"]
        for name, part in state.items():
            part.load_state_dict(saved[name])
        print(f"autoencoder: resumed at step {first}")
    with progress(params.steps, "autoencoder", "step", done=first) as bar:
        for step in range(first, params.steps):
            if step > first and step % CHECKPOINT_EVERY == 0:
                checkpoint.save(scratch, {"steps_done": step, **{name: part.state_dict() for name, part in state.items()}})
            draws = generator("autoencoder", params.seed, step)
            loss = _loss(autoencoder, _batch(images, params.batch_size, draws).to(device), params.kl_weight, draws)
            if not loss.isfinite():
                raise ConfigError(
                    f"the autoencoder's loss is {loss.item()} at step {step}; "
                    f"accepted: autoencoder.learning_rate below {params.learning_rate}"
                )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            bar.update()
    checkpoint.remove(scratch)
    return autoencoder.eval().requires_grad_(False)


def _batch(images: np.ndarray, batch_size: int, draws: torch.Generator) -> Tensor:
    """Random images, each mirrored with probability 1/2: (B, 3, H, W) in -1..1."""
    rows = torch.randint(len(images), (batch_size,), generator=draws)
    mirrored = torch.rand(batch_size, generator=draws) < 0.5
    batch = to_tensor(images[rows.numpy()])
    return torch.where(mirrored.view(-1, 1, 1, 1), batch.flip(3), batch)


def _loss(autoencoder: AutoencoderKL, batch: Tensor, kl_weight: float, draws: torch.Generator) -> Tensor:
    """Mean squared error plus `kl_weight` times the divergence from a standard normal, both per pixel and colour.

    Rombach et al. (2022), appendix G, without the perceptual and the adversarial term, which need networks of their own.
    """
    posterior = autoencoder.encode(batch).latent_dist
    reconstruction = autoencoder.decode(posterior.sample(draws)).sample
    return F.mse_loss(reconstruction, batch) + kl_weight * posterior.kl().sum() / batch.numel()


def load_pretrained(params: PretrainedAutoencoder) -> AutoencoderKL:
    """An `AutoencoderKL` from a local directory in diffusers format, alone or as `vae/` of a pipeline, or from the hub.

    Raises `ConfigError` where there is none or its shape is not the one that `params` states, `ConnectionError` where the hub
    does not answer.
    """
    where: dict[str, Any] = {"revision": params.revision}
    directory = Path(params.path)
    if directory.is_dir():
        if not (directory / "config.json").is_file() and (directory / "vae" / "config.json").is_file():
            where["subfolder"] = "vae"
    elif directory.is_absolute() or params.path.startswith(("./", "../", "~")) or params.path.count("/") > 1:
        raise ConfigError(f"autoencoder.path = '{params.path}': no such directory")
    try:
        _check_shape(params, AutoencoderKL.load_config(params.path, **where))
        return _from_pretrained(params.path, **where)
    except OSError as error:
        if _unreachable(error):
            raise ConnectionError(f"autoencoder.path = '{params.path}' is no directory, and the hub did not answer") from None
        raise ConfigError(f"autoencoder.path = '{params.path}', revision '{params.revision}': {error}") from None


def _check_shape(params: PretrainedAutoencoder, found: dict[str, Any]) -> None:
    kind = found.get("_class_name")
    if kind != AutoencoderKL.__name__:
        raise ConfigError(
            f"autoencoder.path = '{params.path}' holds a model of class {kind}; accepted: {AutoencoderKL.__name__}"
        )
    downsample = 2 ** (len(found["block_out_channels"]) - 1)
    for key, value, stated in (
        ("latent_channels", found["latent_channels"], params.latent_channels),
        ("downsample", downsample, params.downsample),
    ):
        if value != stated:
            raise ConfigError(f"autoencoder.{key} = {stated}, but '{params.path}' has {value}; accepted: {value}")
    for key in ("in_channels", "out_channels"):
        if found[key] != 3:
            raise ConfigError(f"autoencoder.path = '{params.path}' has {key} = {found[key]}; accepted: 3")


def _unreachable(error: BaseException | None) -> bool:
    """Whether no answer of the hub lies behind an error: diffusers' own words do not say."""
    while error is not None:
        if isinstance(error, LocalEntryNotFoundError):
            return True
        error = error.__cause__ or error.__context__
    return False


def load_autoencoder(directory: str | Path, device: torch.device | str) -> AutoencoderKL:
    """What stage `autoencoder` left in `directory`: float32, in eval mode, without gradients, on `device`.

    Raises `InputError` where the directory holds no autoencoder, or a file has changed since it was written, `DataError` where
    its weights do not fit.
    """
    model = Path(directory) / MODEL
    if not (model / "config.json").is_file():
        raise InputError(model / "config.json")
    checksums.verify(model)
    return _from_pretrained(str(model)).to(device)


def _from_pretrained(path: str, **where: Any) -> AutoencoderKL:
    """Safetensors only. Raises `DataError` where the weights are not exactly those of the configured network."""
    options = {"use_safetensors": True, "low_cpu_mem_usage": False, "torch_dtype": torch.float32, "output_loading_info": True}
    autoencoder, loading = AutoencoderKL.from_pretrained(path, **where, **options)
    if wrong := {kind: names for kind, names in loading.items() if names}:
        raise DataError(f"the weights of '{path}' do not fit its config.json: {wrong}")
    return autoencoder.eval().requires_grad_(False)


def save(autoencoder: AutoencoderKL, directory: Path) -> None:
    """Write diffusers format into `directory/model`, without a trace of where the weights came from."""
    autoencoder.register_to_config(_name_or_path="")
    autoencoder.to("cpu").save_pretrained(directory / MODEL)


def to_tensor(images: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """Pixels (B, H, W, 3) uint8 -> (B, 3, H, W) float32 in -1..1, on `device`, where they arrive as bytes."""
    pixels = send(torch.from_numpy(np.array(images, order="C")), torch.device(device))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pixels(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) in -1..1, on any device -> pixels (B, H, W, 3) uint8, rounded and clipped."""
    pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


class Encoder:
    """The encoder of `autoencoder`, in `precision`, by `backend`: one of those that `dit.devices.resolve_backend` returns."""

    def __init__(self, autoencoder: AutoencoderKL, precision: torch.dtype = torch.float32, backend: str = "eager") -> None:
        self.device, self.precision = autoencoder.device, precision

        def posterior(images: Tensor) -> DiagonalGaussianDistribution:
            return autoencoder.encode(images).latent_dist

        def fused() -> Callable[[Tensor], DiagonalGaussianDistribution]:
            moments = FusedEncoder(autoencoder)
            return lambda images: DiagonalGaussianDistribution(moments(images))

        ways = {"fused": fused, "compiled": lambda: torch.compile(posterior), "eager": lambda: posterior}
        self.posterior = ways[backend]()

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> tuple[Tensor, Tensor]:
        """Pixels (B, H, W, 3) uint8 -> mean and standard deviation of the posterior, raw, each (B, C, h, w) float32.

        They are on the autoencoder's device. The exponential is taken in float32.
        """
        with autocast(self.device, self.precision):
            posterior = self.posterior(to_tensor(images, self.device))
        return posterior.mean.float(), posterior.logvar.float().mul(0.5).exp()


@torch.no_grad()
def decode(autoencoder: AutoencoderKL, latents: Tensor) -> np.ndarray:
    """Raw latents (B, C, h, w), on any device -> pixels (B, H, W, 3) uint8."""
    return to_pixels(autoencoder.decode(latents.to(autoencoder.device, torch.float32)).sample)


def reconstruction_quality(autoencoder: AutoencoderKL, images: np.ndarray) -> dict[str, float]:
    """Quality of the reconstructions of validation images (N, H, W, 3) uint8 from their posterior means.

    Means over images, both by scikit-image on 8-bit pixels: `psnr` in dB; `ssim`, Wang et al. (2004), at most 1.
    """
    rows = _spread(len(images), MEASURED_IMAGES)
    psnr, ssim = [], []
    with progress(len(rows), "reconstructions", "image") as bar:
        for start in range(0, len(rows), BATCH_SIZE):
            originals = images[rows[start : start + BATCH_SIZE]]
            for original, copy in zip(originals, reconstruct(autoencoder, originals), strict=True):
                psnr.append(peak_signal(original, copy))
                ssim.append(float(structural_similarity(original, copy, channel_axis=2)))
            bar.update(len(originals))
    return {"psnr": float(np.mean(psnr)), "ssim": float(np.mean(ssim)), "num_images": len(rows)}


def reconstruct(autoencoder: AutoencoderKL, images: np.ndarray) -> np.ndarray:
    """Pixels (N, H, W, 3) uint8 -> the same, encoded and decoded, a few at a time."""
    encoder = Encoder(autoencoder)
    batches = [images[start : start + BATCH_SIZE] for start in range(0, len(images), BATCH_SIZE)]
    return np.concatenate([decode(autoencoder, encoder(batch)[0]) for batch in batches])


def side_by_side(autoencoder: AutoencoderKL, images: np.ndarray) -> Image.Image:
    """Images (N, H, W, 3) uint8, evenly spaced, each on the left of its reconstruction; small ones are enlarged."""
    originals = images[_spread(len(images), SHOWN)]
    pairs = np.concatenate([originals, reconstruct(autoencoder, originals)], axis=2)  # (P, H, 2 W, 3)
    gap = max(1, images.shape[1] // 8)
    tiles = np.pad(pairs, ((0, -len(pairs) % SHOWN_PER_ROW), (0, gap), (0, gap), (0, 0)), constant_values=255)
    _, height, width, _ = tiles.shape
    grid = tiles.reshape(-1, SHOWN_PER_ROW, height, width, 3).swapaxes(1, 2).reshape(-1, SHOWN_PER_ROW * width, 3)
    zoom = max(1, SHOWN_SIZE // images.shape[1])
    return Image.fromarray(grid.repeat(zoom, axis=0).repeat(zoom, axis=1))


def peak_signal(original: np.ndarray, copy: np.ndarray) -> float:
    """Peak signal-to-noise ratio of one image (H, W, 3) uint8 in dB, `MAX_PSNR` at most."""
    with np.errstate(divide="ignore"):
        return min(float(peak_signal_noise_ratio(original, copy)), MAX_PSNR)


def _spread(count: int, at_most: int) -> np.ndarray:
    """Evenly spaced rows among `count`, `at_most` of them."""
    return np.unique(np.linspace(0, count - 1, min(count, at_most)).round().astype(int))
