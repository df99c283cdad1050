"""Wrong parameters are refused before any work, in one message that says what is expected."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from dvc.utils.serialize import load_yaml

from dit import config, yamlfile
from dit.devices import resolve_backend
from dit.errors import ConfigError

SHIPPED = yamlfile.read(ROOT / "params.yaml")


def with_value(key: str, value: Any) -> dict[str, Any]:
    """The shipped parameters with another value, and a strategy of the user's own studied where there is one."""
    data = copy.deepcopy(SHIPPED)
    if key.startswith("strategies."):
        data["study"]["strategies"].append("mine")
        data["strategies"][key.removeprefix("strategies.")] = value
        return data
    *path, last = key.split(".")
    section = data
    for part in path:
        section = section[part]
    section[last] = value
    return data


def test_the_shipped_parameters_are_valid() -> None:
    assert config.parse(SHIPPED).latent_size == 8


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("study.strategies", ["adaln_zero", "nope"], r"unknown strategy 'nope'; expected one of adaln_zero, head_xavier"),
        ("study.baseline", "nope", r"study: baseline = 'nope': expected one of study.strategies"),
        (
            "study.strategies",
            ["my-head"],
            r"strategies\[0\] = 'my-head'; it should be letters, digits and underscores \(pattern",
        ),
        ("study.seeds", [], r"study.seeds = \[\]; it should be a list with at least 1 entry$"),
        ("study.name", "", r"study.name = ''; it should be text that is not empty$"),
        ("study.baseline", None, r"study.baseline = null; it should be a valid string$"),
        ("train.optimizer.betas", 0.9, r"train.optimizer.betas = 0.9; it should be a valid list$"),
        ("study.seeds", [0, 0], r"seeds = \[0, 0\]: expected each entry once"),
        (
            "strategies.my-head",
            {"rules": ["adaln"]},
            r"strategies.my-head: the name is wrong; it should be letters, digits and",
        ),
        ("strategies.a.b", {"rules": ["adaln"]}, r"strategies.a.b.*it should .*pattern"),
        ("strategies.adaln", {"rules": []}, r"strategies: the library has a strategy called 'adaln' .*give yours another name"),
        ("model.name", "DiT-Q/2", r"unknown model 'DiT-Q/2'; expected DiT-SIZE/PATCH with a SIZE of Micro"),
        ("images.size", 36, r"patch size 2 does not divide the latent size 9"),
        ("images.size", 34, r"images.size = 34: expected a multiple of autoencoder.downsample = 4"),
        (
            "images.source.kind",
            "folders",
            r"kind = 'folders'; it should be one of 'photos', 'folder', 'unlabelled', 'huggingface', 'idx', 'webdataset'",
        ),
        ("autoencoder.downsample", 8, r"downsample = 8: expected 4, as channels has 3 entries"),
        (
            "latents.normalize",
            "no",
            r"latents.normalize = 'no'; it should be 'auto', 'published', 'per_channel' or 'global' or a valid number",
        ),
        ("latents.normalize", {"shift": [0.1, 0.2], "scale": 1}, r"latents.normalize.shift has 2 entries: expected 4"),
        ("latents.normalize", "published", r"normalize = 'published' with autoencoder.kind = 'train': expected auto"),
        (
            "autoencoder",
            {"kind": "identity", "latent_channels": 1, "downsample": 1, "threads": 1, "device": "cpu"},
            r"autoencoder.latent_channels = 1 with autoencoder.kind = 'identity': expected images.channels = 3",
        ),
        (
            "autoencoder",
            {"kind": "identity", "latent_channels": 3, "downsample": 1, "threads": 1, "device": "cpu", "steps": 9},
            r"autoencoder.steps is not a known key \(value 9\); only another kind of autoencoder has it",
        ),
        ("images.channels", 2, r"images.channels = 2; it should be 1 or 3"),
        ("train.steps", -3, r"train.steps = -3; it should be greater than 0"),
        ("train.stepz", 3, r"train.stepz is not a known key"),
        ("train.processes", 3, r"train: batch_size = 32; it should be a multiple of processes = 3"),
        ("train.validation.buckets", 999, r"train.validation: buckets = 999; it should be at most samples = 256"),
        ("train.precision", "fp8", r"train.precision = 'fp8'; it should be 'auto', 'fp32', 'bf16' or 'fp16'"),
        ("diffusion.timestep_sampling", "logitnormal", r"timestep_sampling = 'logitnormal'; .*'uniform' or 'logit_normal'"),
        ("diffusion.logit_normal_std", 0, r"diffusion.logit_normal_std = 0; .*greater than 0"),
        ("evaluate.guidance_channels", 0, r"evaluate.guidance_channels = 0; .*'all' or greater than 0"),
        ("diffusion.objective", "v", r"learn_sigma = true with objective 'v'; learn_sigma should be false, or objective 'eps'"),
        ("evaluate.scheduler", "euler", r"evaluate.scheduler = 'euler'; it should be 'ddpm', 'ddim'"),
        (
            "evaluate.scheduler",
            "flow_euler",
            r"does not fit diffusion.objective = 'eps'; expected one of ddpm, ddim",
        ),
        ("evaluate.kernel_subset_size", 10**6, r"kernel_subset_size = 1000000; it should be at most evaluate.num_samples"),
        (
            "strategies.mine",
            {"rules": ["adaln_0"]},
            r"strategies.mine.rules: unknown strategy 'adaln_0'; expected .* adaln_zero",
        ),
        ("strategies.mine", {"rules": [{"role": "gate", "init": "zeros"}]}, r"strategies.mine.rules: no rule claims"),
        (
            "strategies.mine",
            {"rules": ["adaln_zero", {"role": "modulaton", "init": "zeros"}]},
            r"strategies.mine.rules\[7\]: role 'modulaton' names no weight.*did you mean modulation",
        ),
        (
            "strategies.mine",
            {"rules": [{"role": "all", "init": "zero"}]},
            r"rules\[0\].init = 'zero'; it should be one of",
        ),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_what_it_should_be(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        config.parse(with_value(key, value))
    assert str(caught.value).startswith("params.yaml: ")
    assert len(str(caught.value).splitlines()) == 1


def test_a_mistake_in_shared_rules_is_told_once() -> None:
    data = copy.deepcopy(SHIPPED)
    shared = [{"role": "all", "init": "zeroes"}]  # as a YAML alias gives it
    data["strategies"] = {name: {"rules": [shared]} for name in ("a", "b", "c", "d", "e")}
    with pytest.raises(ConfigError, match=r"a.rules\[0\].init = 'zeroes'.*the same in b, c, d and 1 more\)$") as caught:
        config.parse(data)
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_key_is_named() -> None:
    data = copy.deepcopy(SHIPPED)
    del data["train"]["steps"]
    with pytest.raises(ConfigError, match=r"params.yaml: train.steps is missing"):
        config.parse(data)


def test_every_wrong_key_is_told_at_once() -> None:
    data = with_value("train.steps", 0)
    data["train"]["batch_size"] = 0
    data["autoencoder"]["steps"] = "many"
    with pytest.raises(ConfigError) as caught:
        config.parse(data)
    assert [line.split(";")[0].removeprefix("params.yaml: ") for line in str(caught.value).splitlines()] == [
        "autoencoder.steps = 'many'",
        "train.steps = 0",
        "train.batch_size = 0",
    ]


def test_a_missing_or_broken_file_is_one_clear_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.yaml: no such file"):
        config.load(tmp_path / "nowhere.yaml")
    broken = tmp_path / "params.yaml"
    broken.write_text("train: [")
    with pytest.raises(ConfigError, match=r"params.yaml: not valid YAML"):
        config.load(broken)
    broken.write_text("train:\n  steps: 350\n  seed: 0\n  steps: 20\n")
    with pytest.raises(ConfigError, match=r"params.yaml: not valid YAML: line 4: found duplicate key \"steps\""):
        config.load(broken)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("350", None),
        ("0350", None),
        ("true", r"train.steps = True; .*valid integer"),
        ("350.0", r"train.steps = 350.0; .*valid integer"),
        ("1:30", r"train.steps = '1:30'; .*valid integer"),
        ("'350'", r"train.steps = '350'; .*valid integer"),
    ],
)
def test_a_count_is_a_whole_number_as_dvc_reads_it(tmp_path: Path, written: str, message: str | None) -> None:
    file = tmp_path / "params.yaml"
    file.write_text((ROOT / "params.yaml").read_text().replace("steps: 350", f"steps: {written}"))
    assert load_yaml(file) == yamlfile.read(file)  # DVC's reader
    if message:
        with pytest.raises(ConfigError, match=message):
            config.load(file)
    else:
        assert config.load(file).train.steps == 350


@pytest.mark.parametrize(
    ("key", "value"),
    [("train.learning_rate", True), ("train.learning_rate", "1e-3"), ("study.seeds", [True]), ("train.deterministic", "yes")],
)
def test_no_value_is_turned_into_another_kind(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=r"valid (number|integer|boolean)"):
        config.parse(with_value(key, value))
    assert yamlfile.parse("1e-3", "text") == 1e-3 == config.parse(with_value("train.learning_rate", 1e-3)).train.learning_rate


@pytest.mark.parametrize(
    ("device", "precision", "fusible", "chosen"),
    [
        ("cuda", torch.bfloat16, True, "fused"),
        ("cuda", torch.bfloat16, False, "compiled"),
        ("cuda", torch.float32, True, "compiled"),
        ("cpu", torch.float32, True, "eager"),
    ],
)
def test_auto_is_the_fastest_backend_that_can_run(device: str, precision: torch.dtype, fusible: bool, chosen: str) -> None:
    assert resolve_backend("auto", torch.device(device), precision, fusible, "train", "a multiple of 16 tokens") == chosen
    assert resolve_backend("eager", torch.device(device), precision, fusible, "train", "a multiple of 16 tokens") == "eager"
    if chosen != "fused":
        with pytest.raises(ConfigError, match=r"evaluate\.backend = 'fused' cannot run here; use auto, compiled or eager"):
            resolve_backend("fused", torch.device(device), precision, fusible, "evaluate", "a multiple of 16 tokens")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.learning_rate", float("inf")),
        ("train.gradient_clip", float("nan")),
        ("train.steps", True),
        ("train.steps", 10**4000),
        ("train.threads", 2**63),
        ("images.size", 65536),
        ("autoencoder.channels", [16, 32, 10**6]),
        ("autoencoder.latent_channels", 10**6),
        ("images.workers", 2**40),
    ],
)
def test_numbers_that_no_machine_can_serve_are_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        config.parse(with_value(key, value))
    assert str(error.value).startswith(f"params.yaml: {key}")
    assert len(str(error.value)) < 1200


def test_more_rules_than_can_be_compared_with_the_network_are_refused() -> None:
    rules = [{"role": "all", "init": "zeros"}] * 3000
    values = {**with_value("model.depth", 1000), "strategies": {"long": {"description": "", "source": "", "rules": rules}}}
    values["study"] = {**values["study"], "strategies": ["adaln_zero", "long"], "declared": []}
    with pytest.raises(ConfigError, match=r"study.strategies: they have 3,0\d\d rules, for 24,013 roles; expected at most 208"):
        config.parse(values)
