"""Networks of others: a class of diffusers, and a module of the user's, take part in a study like any other."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file
from scipy.stats import ks_2samp
from studies import MICRO, run_stage
from typer.testing import CliRunner

from dit import config, init, models, yamlfile
from dit.analysis.wakeup import patterns
from dit.cli import app
from dit.config import Params
from dit.errors import ConfigError
from dit.init.selectors import select
from dit.models import Denoiser
from dit.models.dit.network import DiT
from pipelines.run_metrics import finished, start_values, values
from pipelines.stages.analyse import analyse
from pipelines.stages.autoencoder import autoencoder
from pipelines.stages.compare import compare
from pipelines.stages.evaluate import evaluate
from pipelines.stages.features import features
from pipelines.stages.images import images
from pipelines.stages.latents import latents
from pipelines.stages.train import train

SIZES: dict[str, Any] = {"latent_size": 8, "latent_channels": 4, "num_classes": 3, "learn_sigma": True}
TINY = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
UNET = {
    "block_out_channels": [16, 16],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "norm_num_groups": 8,
    "layers_per_block": 1,
}
CONSTRUCTOR = {"role": "all", "init": "constructor"}


def code(language: str, start: str) -> str:
    """The code block of docs/extending.md that starts so."""
    text = (ROOT / "docs" / "extending.md").read_text()
    (found,) = [block for block in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL) if block.startswith(start)]
    return found


def tiny(**changes: Any) -> Denoiser:
    return models.build("diffusers:DiTTransformer2DModel", **SIZES | changes, arguments=TINY)


def initialised(network: Denoiser, rules: list[dict[str, Any]], seed: int = 0) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in init.apply(network, {"rules": rules}, seed).named_parameters()}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the module of docs/extending.md, and the images, autoencoder, latents and features of a micro study."""
    folder = tmp_path_factory.mktemp("external")
    (folder / "conv_mixer.py").write_text(code("python", '"""A small class-conditional ConvMixer'))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        params = study(strategies={}, study=STUDY | {"baseline": "constructor", "strategies": ["constructor"]})
        for stage in (images, autoencoder, latents, features):
            run_stage(stage, params)
        yield folder
    sys.modules.pop("conv_mixer", None)


CLASSES = 16
"""Of the pictures of the micro study."""
STUDY = {"name": "external", "seeds": [0]}
SHORT = {"train.steps": 6, "train.diagnose_every": 3, "train.validate_every": 3}


def study(**sections: Any) -> Params:
    """Write parameters of a micro study with some other sections, and read them."""
    data = yamlfile.read(ROOT / "params.yaml")
    for key, value in (MICRO | SHORT).items():
        *path, last = key.split(".")
        section = data
        for name in path:
            section = section[name]
        section[last] = value
    Path("params.yaml").write_text(json.dumps(data | sections))
    return config.load("params.yaml")


def mixer_study() -> Params:
    return study(
        **yamlfile.parse(code("yaml", 'model:\n  name: "conv_mixer'), "docs"),
        strategies=yamlfile.parse(code("yaml", "mixer_zero"), "docs"),
        study=STUDY | {"baseline": "constructor", "strategies": ["constructor", "mixer_zero"]},
    )


def diffusers_study() -> Params:
    rules = [CONSTRUCTOR, {"role": ["norm1.linear", "proj_out_1", "proj_out_2"], "init": "zeros"}]
    return study(
        **yamlfile.parse(code("yaml", 'model:\n  name: "diffusers'), "docs"),
        strategies={"zeroed": {"rules": rules}},
        study=STUDY | {"baseline": "constructor", "strategies": ["constructor", "zeroed"]},
    )


@pytest.mark.parametrize("make", [mixer_study, diffusers_study])
def test_a_study_of_somebody_elses_network_ends_with_a_report_and_runs_for_mlflow(
    prepared: Path, make: Callable[[], Params]
) -> None:
    params = make()
    for strategy in params.study.strategies:
        run_stage(analyse, params, strategy)
        run_stage(train, params, f"{strategy}-0")
        run_stage(evaluate, params, f"{strategy}-0")
    run_stage(compare, params)
    page = Path("reports/index.html").read_text()
    assert "measured, not predicted" in page
    assert all(f'id="figure-{name}"' in page for name in ("wake-up", "gradients", "conditioning", "depth", "updates"))
    assert not any(f'id="figure-{name}"' in page for name in ("widths", "units", "gates", "ranks"))
    runs = list(finished(prepared, params))
    names = {name for run in runs for name, *_ in [*values(run, None), *start_values(run.analysis)]}
    assert len(runs) == 2
    assert all(re.fullmatch(r"[\w./-]+", name) for name in names)
    parts = {name for name, _ in params.network({"num_classes": 3}).named_children() if name not in ("norm_out", "pos_embed")}
    assert {f"gradient_rms/{part}" for part in parts} <= names


def test_what_a_study_trained_loads_into_the_network_itself(prepared: Path) -> None:
    params = diffusers_study()
    run_stage(train, params, "constructor-0")
    theirs = DiTTransformer2DModel(**TINY, in_channels=4, out_channels=8, sample_size=4, num_embeds_ada_norm=CLASSES)
    theirs.load_state_dict(load_file("runs/train/constructor-0/ema.safetensors"), strict=True)
    ours = params.network({"num_classes": CLASSES})
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, t, y = torch.randn(2, 4, 4, 4), torch.tensor([3, 500]), torch.tensor([1, CLASSES])
    assert torch.equal(ours(x, t, y), theirs.eval()(x, timestep=t, class_labels=y).sample)


def test_the_commands_work_for_somebody_elses_network(prepared: Path) -> None:
    mixer_study()

    def told(*arguments: str) -> str:
        return CliRunner().invoke(app, [*arguments]).output

    assert "conv_mixer:conv_mixer on latents" in told("check")
    table = told("init", "--strategy", "mixer_zero")
    assert re.search(r"blocks\[0:2\].modulation.weight\[32:48\] .* 16 x 16 .* zeros .* 100%", table)
    changes = told("init", "--diff", "constructor", "mixer_zero")
    assert re.search(r"blocks\[0:2\].modulation.bias\[32:48\] .* constructor .* zeros .* 32 ", changes)
    assert "There is no prediction for ConvMixer. Stage `analyse` measures the schedule" in told("wakeup")
    audit = told("audit", "strategy:mixer_zero")
    assert "ConvMixer" in audit
    assert "zero" in audit


def test_labels_are_dropped_by_the_batch_and_not_by_the_network() -> None:
    network = tiny().train()
    x, t, y = torch.randn(64, 4, 8, 8), torch.full((64,), 10), torch.zeros(64, dtype=torch.long)
    assert torch.equal(network(x, t, y), network(x, t, y))
    assert not torch.equal(network(x, t, y), network(x, t, y + 3))


def test_a_unet_of_diffusers_is_a_backbone_too() -> None:
    network = models.build("diffusers:UNet2DModel", **SIZES, arguments=UNET)
    init.apply(network, {"rules": [CONSTRUCTOR]}, seed=0)
    assert network(torch.randn(2, 4, 8, 8), torch.tensor([0, 9]), torch.tensor([0, 3])).shape == (2, 8, 8, 8)


def test_what_a_constructor_draws_is_a_function_of_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = initialised(tiny(), [CONSTRUCTOR])
    torch.manual_seed(2)
    again, other = initialised(tiny(), [CONSTRUCTOR]), initialised(tiny(), [CONSTRUCTOR], seed=1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_the_constructor_of_a_dit_is_torch_default(micro: Callable[..., DiT]) -> None:
    ours, theirs = (initialised(micro(), [*init.named(name).resolved]) for name in ("torch_default", "constructor"))
    for role in models.roles(micro()):
        assert ks_2samp(ours[role.parameter].flatten(), theirs[role.parameter].flatten()).pvalue > 1e-4, role.path


def test_the_rest_of_the_network_and_all_randomness_are_left_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    init.apply(tiny(), {"rules": [CONSTRUCTOR]}, seed=5)
    assert torch.equal(torch.rand(3), expected)


MODULATION = "transformer_blocks.*.norm1.linear.weight"


@pytest.mark.parametrize(
    ("selector", "count"),
    [
        ("all", 2 * 19 + 6),
        ("bias", 2 * 9 + 3),
        ("*.bias", 2 * 9 + 3),
        (MODULATION, 2),
        ("transformer_blocks.1.norm1.linear", 2),
        ("transformer_blocks[0:1].norm1.linear", 2),
        ("to_out.0.weight", 2),
        ("net.2", 4),
    ],
)
def test_tensors_are_addressed_by_parts_of_their_names_and_by_patterns(selector: str, count: int) -> None:
    assert len(select(selector, models.roles(tiny()))) == count


def test_rows_of_a_tensor_are_addressed_by_numbers_and_fractions_and_the_last_rule_has_them() -> None:
    def first(*rules: dict[str, Any]) -> list[float]:
        weight = initialised(tiny(), [CONSTRUCTOR, *rules])["transformer_blocks.0.norm1.linear.weight"]
        assert all((chunk == chunk[0, 0]).all() for chunk in weight.chunk(6) if chunk[0, 0] in (0, 1, 2))
        return [value if (value := chunk[0, 0].item()) in (0, 1, 2) else -1 for chunk in weight.chunk(6)]

    zeros, one, two = {"init": "zeros"}, {"init": "constant", "value": 1.0}, {"init": "constant", "value": 2.0}
    assert first({"role": f"{MODULATION}[2/6:3/6]", **zeros}) == [-1, -1, 0, -1, -1, -1]
    assert first({"role": f"{MODULATION}[64:96]", **zeros}) == [-1, -1, 0, -1, -1, -1]
    assert first({"role": MODULATION, **zeros}, {"role": "norm1.linear.weight[:1/3]", **one}) == [1, 1, 0, 0, 0, 0]
    overlapping = [{"role": f"{MODULATION}[1/6:4/6]", **one}, {"role": f"{MODULATION}[3/6:]", **two}]
    assert first({"role": MODULATION, **zeros}, *overlapping) == [0, 1, 1, 2, 2, 2]


def test_every_row_is_claimed_by_exactly_one_rule_however_rules_slice() -> None:
    network = tiny()
    slices = ["[5:11]", "[1/2:]", "[:1/3]", "[10:100]"]
    rules = [CONSTRUCTOR, *({"role": f"{MODULATION}{rows}", "init": "zeros"} for rows in slices)]
    covered = {name: torch.zeros(len(weight)) for name, weight in network.named_parameters() if weight.requires_grad}
    for role in init.claims(init.Strategy(rules=rules), models.roles(network)):
        covered[role.parameter][role.rows] += 1
    assert all((count == 1).all() for count in covered.values())


def test_rows_of_a_dit_can_be_addressed_too_and_its_wake_up_stays_predicted(micro: Callable[..., DiT]) -> None:
    rules = [*init.named("adaln_zero").resolved, {"role": "final.projection.weight[:1/2]", "init": "xavier_uniform"}]
    network = init.apply(micro(), {"rules": rules}, seed=0)
    assert [bool(half.any()) for half in network.final_layer.linear.weight.chunk(2)] == [True, False]
    assert not patterns(init.Strategy(rules=rules), micro())["final.projection.weight"].zero


@pytest.mark.parametrize(
    ("role", "message"),
    [
        ("transformer_blocks.*.norm2.weight", r"rules\[1\]: role '.*' matches no weight.*such as pos_embed.proj.weight"),
        ("norm1.linaer", r"rules\[1\]: role 'norm1.linaer' names no weight.*did you mean linear"),
        ("transformer_blocks[5].norm1", r"where transformer_blocks\[i\] and .* address blocks 0 to 1"),
        (f"{MODULATION}[0:193]", r"rules\[1\]: role '.*\[0:193\]': the role has 192 rows; expected \[i:j\] with"),
        (f"{MODULATION}[1/5:]", r"rules\[1\]: role '.*': 1/5 of 192 rows is not a whole number"),
    ],
)
def test_a_selector_that_names_nothing_is_refused(role: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        init.apply(tiny(), {"rules": [CONSTRUCTOR, {"role": role, "init": "zeros"}]}, seed=0)


def no_null_class(num_classes: int, latent_channels: int) -> torch.nn.Module:
    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.label = torch.nn.Embedding(num_classes, latent_channels)

        def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + self.label(y)[:, :, None, None]

    return Network()


def two_inputs() -> torch.nn.Module:
    return torch.nn.Bilinear(4, 4, 4)


def wrong_shape(latent_channels: int) -> torch.nn.Module:
    network = torch.nn.Conv2d(latent_channels, latent_channels, 1)
    network.forward = lambda x, t, y: torch.nn.Conv2d.forward(network, x)  # type: ignore[method-assign]
    return network


HERE = "test_external"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("diffusers:SD3Transformer2DModel", {}, "not a class-conditional network of latents: its forward has no class_labels"),
        ("diffusers:UNet2DConditionModel", {}, "its forward also needs encoder_hidden_states"),
        ("diffusers:Nothing", {}, "diffusers has no network 'Nothing'"),
        ("diffusers:DiTTransformer2DModel", {"in_channels": 3}, "in_channels follows from the study"),
        ("diffusers:DiTTransformer2DModel", {"widht": 3}, "unexpected keyword argument 'widht'; its signature is"),
        ("no.such_module:make", {}, "No module named 'no'; expected a module that Python can import"),
        (f"{HERE}:no_such_function", {}, f"{HERE} has no function 'no_such_function'"),
        (f"{HERE}:TINY", {}, f"{HERE} has no function 'TINY'"),
        (f"{HERE}:digest", {}, f"{HERE} has no function 'digest'"),
        (f"{HERE}:no_null_class", {"learn_sigma": True}, "unexpected keyword argument 'learn_sigma'"),
        (f"{HERE}:no_null_class", {}, r"needs num_classes \+ 1 = 4 rows"),
        (f"{HERE}:two_inputs", {}, r"is called as \(x, t, y\), which its forward.* does not take"),
        (f"{HERE}:wrong_shape", {}, r"returned shape \(2, 4, 8, 8\); expected \(2, 8, 8, 8\), twice the latent channels"),
    ],
)
def test_a_network_that_cannot_take_part_is_refused_with_what_is_missing(
    name: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        models.build(name, **SIZES, arguments=arguments)


def test_mistakes_are_told_when_parameters_are_checked(prepared: Path) -> None:
    wrong = {"name": f"{HERE}:wrong_shape", "label_dropout": 0.1}
    chosen = STUDY | {"baseline": "constructor", "strategies": ["constructor"]}
    with pytest.raises(ConfigError, match=r"model.name = 'test_external:wrong_shape', .* returned shape \(2, 4, 4, 4\)"):
        study(model=wrong, strategies={}, study=chosen)


def test_the_strategy_of_the_docs_says_what_it_changes(micro: Callable[..., DiT]) -> None:
    strategy = yamlfile.parse(code("yaml", "half_open"), "docs")["half_open"]
    network = init.apply(micro(), {"rules": strategy["rules"]}, seed=0)
    bias = network.blocks[0].adaLN_modulation[1].bias.chunk(6)  # type: ignore[index,union-attr]
    assert [part.unique().tolist() for part in bias] == [[0], [0], [0.5], [0], [0], [0.5]]
    assert network.final_layer.linear.weight.std().item() == pytest.approx(0.01, rel=0.1)


def test_a_folder_is_a_backbone_and_nothing_else_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "linear").mkdir()
    (tmp_path / "linear" / "__init__.py").write_text(code("python", '"""A linear denoiser'))
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    models.backbones.cache_clear()
    try:
        network = init.apply(models.build("Linear", **SIZES), "torch_default", seed=0)
        assert network(torch.randn(2, 4, 8, 8), torch.tensor([0, 9]), torch.tensor([0, 3])).shape == (2, 8, 8, 8)
        assert [role.path for role in models.roles(network)] == [
            "label_table.weight",
            "final.projection.weight",
            "final.projection.bias",
        ]
    finally:
        sys.modules.pop("dit.models.linear", None)
        models.backbones.cache_clear()
