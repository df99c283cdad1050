"""`dit sample` and `dit export`: networks in and out, in the formats of others."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from studies import ONE_SETTING, ROOT
from typer.testing import CliRunner

from dit import autoencoder, checkpoint, checksums, config, init, models, sections, yamlfile
from dit.cli import app
from dit.data.latents import LatentStore
from dit.data.store import StoreWriter
from dit.exchange.trained import Where, load
from dit.models import Denoiser
from dit.seeding import generator
from dit.training.kept import KeptRun, RunSettings, digest

CLASSES = ["cat", "dog", "fox"]
SIZES: dict[str, Any] = {"latent_size": 8, "latent_channels": 4, "num_classes": 3}


def changed(**given: dict[str, Any]) -> config.Params:
    values = {f"{section}.{key}": value for section, keys in given.items() for key, value in keys.items()}
    return config.load(ROOT / "params.yaml").with_values(ONE_SETTING | values)


def run(*arguments: str) -> str:
    """What `dit` prints; it must succeed."""
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 2, result.output
    return " ".join(result.output.split())


def random_network(name: str, **sizes: Any) -> Denoiser:
    """With random weights everywhere, so that every tensor matters."""
    network = models.build(name, **{**SIZES, "learn_sigma": name.startswith("DiT"), **sizes})
    with torch.no_grad():
        for index, weight in enumerate(network.parameters()):
            if weight.requires_grad:
                weight.copy_(torch.randn(weight.shape, generator=generator(0, index)) * 0.1)
    return network


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> config.Params:
    """A folder with a run of a DiT-Micro/2, latents normalised by channel, and an autoencoder."""
    monkeypatch.chdir(tmp_path)
    params = changed(
        images={"size": 16},
        autoencoder={"channels": [8, 8], "downsample": 2},
        model={"name": "DiT-Micro/2"},
        evaluate={"num_samples": 10, "batch_size": 4, "steps": 4, "kernel_subset_size": 6, "kernel_subsets": 4, "nearest_k": 2},
    )
    Path("params.yaml").write_text(yamlfile.dump(params._written))
    assert isinstance(params.autoencoder, sections.TrainedAutoencoder)
    autoencoder.save(autoencoder.build(params.autoencoder, 16).eval(), Path("data/autoencoder"))
    vae = autoencoder.load_autoencoder("data/autoencoder", "cpu")
    vae.register_to_config(scaling_factor=0.5)
    vae.save_pretrained("vae")
    store = StoreWriter("data/latents", train_mean=(np.float32, (1, 4, 8, 8)))
    store.append("train_mean", np.zeros((1, 1, 4, 8, 8), np.float32))
    normalize = {"shift": [0.1, -0.2, 0.3, 0.0], "scale": [2.0, 1.5, 3.0, 0.5]}
    store.close(class_names=CLASSES, num_classes=3, normalize=normalize)
    Path("runs/train/adaln_zero-0").mkdir(parents=True)
    save_file(random_network("DiT-Micro/2").state_dict(), "runs/train/adaln_zero-0/ema.safetensors")
    record = {
        "strategy": "adaln_zero",
        "seed": 0,
        "status": "finished",
        "steps_done": 7,
        "settings": {
            "model": params.model.model_dump(mode="json"),
            "diffusion": params.diffusion.model_dump(mode="json"),
            "train": {"learning_rate": 0.001},
            "rules": [],
        },
        "final": {"ema_validation_mse": 0.5},
    }
    Path("runs/train/adaln_zero-0/run.json").write_text(json.dumps(record))
    return params


def archive(path: str) -> np.ndarray:
    with np.load(path, allow_pickle=False) as file:
        assert file.files == ["arr_0"]
        return file["arr_0"]


def from_pipeline(
    directory: str, settings: dict[str, Any], classes: list[int], seed: int = 0, any_steps: bool = False
) -> np.ndarray:
    pipe = DiTPipeline.from_pretrained(directory)
    pipe.set_progress_bar_config(disable=True)
    if any_steps:
        for module in pipe.transformer.modules():
            if type(module).__name__ == "Timesteps":
                module.downscale_freq_shift = 0
    noise = [generator(seed, "sample", index) for index in range(len(classes))]
    images = pipe(class_labels=classes, generator=noise, output_type="np", **settings).images
    return (images * 255).round().astype(np.uint8)


OPTIONS = ("--guidance-scale", "1.5", "--guidance-channels", "all")


@pytest.mark.parametrize(("scheduler", "steps"), [("ddim", "10"), ("dpmsolver++", "20"), ("ddim", "50")])
def test_an_exported_pipeline_gives_the_samples_of_the_run(study: config.Params, scheduler: str, steps: str) -> None:
    sampler = ("--scheduler", scheduler, "--steps", steps)
    run("sample", "adaln_zero-0", "--output", "ours.npz", "--num-samples", "4", *sampler, *OPTIONS)
    run("export", "adaln_zero-0", "exported", *sampler)
    ours = archive("ours.npz")
    assert ours.shape == (4, 16, 16, 3)
    assert ours.std() > 10
    settings = {"guidance_scale": 1.5, "num_inference_steps": int(steps)}
    theirs = from_pipeline("exported", settings, [0, 1, 2, 0])
    assert np.abs(ours.astype(int) - theirs).max() <= 1
    run("sample", "exported", "--output", "again.npz", "--num-samples", "4", *sampler, *OPTIONS)
    assert np.abs(ours.astype(int) - archive("again.npz")).max() <= 1


def test_with_any_steps_the_pipeline_is_exact_for_other_steps_once_its_time_is_mended(study: config.Params) -> None:
    run("export", "adaln_zero-0", "exported", "--any-steps")  # with the scheduler of the study, dpmsolver++
    sampler = ("--scheduler", "dpmsolver++", "--steps", "25", *OPTIONS)
    run("sample", "adaln_zero-0", "--output", "ours.npz", "--num-samples", "2", *sampler)
    theirs = from_pipeline("exported", {"guidance_scale": 1.5, "num_inference_steps": 25}, [0, 1], any_steps=True)
    assert np.abs(archive("ours.npz").astype(int) - theirs).max() <= 1
    assert "downscale_freq_shift = 0" in Path("exported/README.md").read_text()


@pytest.mark.parametrize("options", [(), ("--any-steps",), ("--format", "safetensors")])
def test_exported_tensors_come_back_equal(study: config.Params, options: tuple[str, ...]) -> None:
    run("export", "adaln_zero-0", "exported", *options)
    back, wanted = load("exported", Where()).network.state_dict(), load_file("runs/train/adaln_zero-0/ema.safetensors")
    assert back.keys() == wanted.keys()
    assert all(torch.equal(back[name], wanted[name]) for name in wanted)


def test_a_card_says_what_the_network_is_and_how_to_load_it(study: config.Params) -> None:
    run("export", "adaln_zero-0", "exported")
    text = Path("exported/README.md").read_text()
    for part in ("DiT-Micro/2", "cat, dog, fox", "adaln_zero", "learning_rate", "0.5", "DiTPipeline.from_pretrained"):
        assert part in text
    assert "num_inference_steps = 4 or 50" in text
    pipe = DiTPipeline.from_pretrained("exported")
    assert pipe.get_label_ids(["fox"]) == [2]


PUBLISHED = [("DiT", "DiT-Micro/2"), ("SiT", "SiT-Micro/2"), ("LightningDiT", "LightningDiT-Micro/2")]


def in_published_layout(name: str, path: Path, wrapper: str = "") -> dict[str, torch.Tensor]:
    """A file as the training scripts of DiT, SiT and LightningDiT write it: `model`, `ema`, optimiser, arguments."""
    weights = random_network(name).state_dict()
    other = {f"{wrapper}{key}": torch.zeros_like(value) for key, value in weights.items()}
    ema = {f"{wrapper}{key}": value for key, value in weights.items()}
    torch.save({"model": other, "ema": ema, "opt": {"state": {}}, "args": argparse.Namespace(model=name)}, path)
    return weights


@pytest.mark.parametrize(("family", "name"), PUBLISHED)
@pytest.mark.parametrize("wrapper", ["", "module."])
def test_published_checkpoints_are_sampled_with_their_averaged_weights(
    study: config.Params, family: str, name: str, wrapper: str
) -> None:
    wanted = in_published_layout(name, Path("0050000.pt"), wrapper)
    trained = load("0050000.pt", Where(model=name))
    assert type(trained.network).__name__ == family
    found = trained.network.state_dict()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    options = ("--checkpoint", "0050000.pt", "--model", name, "--vae", "vae", "--num-sampling-steps", "10")
    more = ("--cfg-scale", "2", "--seed", "3", "--num-fid-samples", "3", "--class-labels", "2,0")
    run("sample", *options, *more, "--output", "pictures")
    assert sorted(path.name for path in Path("pictures").iterdir()) == ["000000.png", "000001.png", "000002.png"]
    with Image.open("pictures/000000.png") as picture:
        assert picture.size == (16, 16)


@pytest.mark.parametrize(("family", "name"), PUBLISHED)
@pytest.mark.parametrize("wrapper", ["", "module."])
def test_training_goes_on_from_published_checkpoints(tmp_path: Path, family: str, name: str, wrapper: str) -> None:
    path = tmp_path / "0050000.pt"
    wanted = in_published_layout(name, path, wrapper)
    rule = {"role": "all", "init": "from_checkpoint", "path": str(path), "sha256": checksums.sha256(path)}
    network = models.build(name, learn_sigma=family == "DiT", **SIZES)
    strategy = {"description": "as published", "source": "a file", "rules": [rule]}
    init.apply(network, strategy, 0)
    found = network.state_dict()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_what_diffusers_cannot_express_is_refused_with_what_to_do_instead(study: config.Params) -> None:
    in_published_layout("SiT-Micro/2", Path("sit.pt"))
    options = ("--checkpoint", "sit.pt", "--model", "SiT-Micro/2", "--vae", "vae")
    message = refused("export", *options, "exported")
    assert "is a SiT, and diffusers has no class that computes the same" in message
    assert "--format safetensors" in message
    run("export", *options, "exported", "--format", "safetensors")
    assert type(load("exported", Where()).network).__name__ == "SiT"
    sampler = ("--steps", "5", "--num-samples", "2")
    run("sample", "exported", "--output", "a.npz", *sampler)
    run("sample", *options, "--output", "b.npz", *sampler)
    np.testing.assert_array_equal(archive("a.npz"), archive("b.npz"))
    assert "too many for an exact export" in refused("export", "adaln_zero-0", "x", "--scheduler", "ddim", "--steps", "250")
    assert "expected ddim or dpmsolver++" in refused("export", "adaln_zero-0", "x", "--scheduler", "ddpm")
    assert not Path("x").exists()


def test_a_wrong_target_or_option_is_one_message(study: config.Params) -> None:
    Path("there").mkdir()
    Path("there/file").touch()
    assert "'nobody-7' is no run in runs/train" in refused("sample", "nobody-7")
    assert "'adaln_zro-0' is no run in runs/train, which has adaln_zero-0, no checkpoint" in refused("sample", "adaln_zro-0")
    assert "expected one of RUN and --checkpoint FILE" in refused("sample")
    assert "missing.pt: no such file" in refused("sample", "missing.pt")
    assert "has the classes 0 to 2" in refused("sample", "adaln_zero-0", "--class-labels", "3")
    assert "there is there already" in refused("sample", "adaln_zero-0", "--output", "there")
    assert "predicts eps; expected ddpm" in refused("sample", "adaln_zero-0", "--scheduler", "flow_euler")
    in_published_layout("DiT-Micro/2", Path("dit.pt"))
    assert "no autoencoder for them is known" in refused("sample", "dit.pt", "--output", "none")
    assert "leave --model out, or give DiT-Micro/2" in refused("sample", "dit.pt", "--model", "DiT-XL/2")
    assert "is no SiT" in refused_lightning()


def refused_lightning() -> str:
    in_published_layout("LightningDiT-Micro/2", Path("lightning.pt"))
    return refused("sample", "lightning.pt", "--model", "SiT-Micro/2")


def test_samples_do_not_depend_on_how_many_are_drawn_at_a_time(study: config.Params) -> None:
    for size in ("2", "5"):
        run("sample", "adaln_zero-0", "--num-samples", "5", "--batch-size", size, "--output", f"{size}.npz")
    assert np.abs(archive("2.npz").astype(int) - archive("5.npz")).max() <= 1
    run("sample", "runs/train/adaln_zero-0", "--num-samples", "5", "--output", "grid.png")
    with Image.open("grid.png") as grid:
        assert grid.size == (3 * 16, 2 * 16)


def keep(params: config.Params, steps: list[int]) -> None:
    """Checkpoints of the run adaln_zero-0 as training keeps them; the averaged weights of step S are all S / 100."""
    folder = Path(".scratch/abc")
    settings = {"name": "adaln_zero-0", "seed": 0, "model": params.model, "diffusion": params.diffusion, "train": params.train}
    about = {"device": "cpu", "precision": "fp32", "backend": "eager", "processes": 1, "torch": torch.__version__}
    store = LatentStore("data/latents")
    run = KeptRun(settings=RunSettings(**settings), sizes=SIZES, latents="data/latents", latents_digest=digest(store), **about)
    for step in steps:
        weights = {
            name: torch.full_like(weight, step / 100) for name, weight in random_network("DiT-Micro/2").state_dict().items()
        }
        checkpoint.save(folder / "kept" / str(step), {"ema": weights})
    (folder / "kept" / "run.json").write_text(run.model_dump_json())


def test_a_kept_checkpoint_is_sampled_by_its_step(study: config.Params) -> None:
    keep(study, [3, 5])
    for step in ("3", "5"):
        run("sample", "adaln_zero-0", "--step", step, "--num-samples", "4", "--output", f"{step}.npz")
        trained: Any = load("adaln_zero-0", Where(step=int(step)))
        assert trained.name == f"adaln_zero-0-step-{step}"
        assert trained.network.final_layer.linear.bias.mean().item() == pytest.approx(int(step) / 100)
    assert (archive("3.npz") != archive("5.npz")).any()
    assert "error: no checkpoint of 'adaln_zero-0' is kept at step 4; these are: step 3: .scratch" in refused(
        "sample", "adaln_zero-0", "--step", "4"
    )


def test_a_kept_checkpoint_is_not_sampled_with_other_latents_than_its_own(study: config.Params) -> None:
    keep(study, [3])
    manifest = json.loads(Path("data/latents/manifest.json").read_text())
    shutil.rmtree("data/latents")
    store = StoreWriter("data/latents", train_mean=(np.float32, (1, 4, 8, 8)))
    store.append("train_mean", np.ones((1, 1, 4, 8, 8), np.float32))
    store.close(class_names=CLASSES, num_classes=3, normalize=manifest["normalize"])
    assert "does not hold the latents that" in refused("sample", "adaln_zero-0", "--step", "3")


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`dit` in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dit.cli"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, env=environment)


def test_two_processes_draw_the_images_of_one(study: config.Params) -> None:
    done = torchrun("sample", "adaln_zero-0", "--num-samples", "7", "--output", "two.npz", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("7 images of adaln_zero-0 are in two.npz") == 1
    run("sample", "adaln_zero-0", "--num-samples", "7", "--output", "one.npz", "--device", "cpu")
    assert np.abs(archive("one.npz").astype(int) - archive("two.npz")).max() <= 1
    again = torchrun("sample", "adaln_zero-0", "--num-samples", "7", "--output", "two.npz", "--device", "cpu")
    assert again.returncode
    assert again.stderr.count("error: two.npz is there already") == 1


def test_two_processes_measure_the_images_of_one(study: config.Params) -> None:
    run("sample", "adaln_zero-0", "--num-samples", "8", "--output", "real.npz", "--seed", "5")
    options = ("--reference", "real.npz", "--num-samples", "7", "--nearest-k", "2", "--json", "--device", "cpu")
    done = torchrun("evaluate", "adaln_zero-0", *options, "--output", "two.npz")
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout[done.stdout.index("{\n") :])
    said = run("evaluate", "adaln_zero-0", *options)
    one = json.loads(said[said.index("{\n") :])
    assert two["images"] == one["images"] == {"generated": 7, "reference": 8}
    assert two["figures"]["fid"] == pytest.approx(one["figures"]["fid"], rel=0.05)
    assert len(archive("two.npz")) == 7
