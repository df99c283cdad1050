"""The wake-up schedule: predicted from a strategy and the architecture, and the same when measured."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from networks import dit_roles
from torch import nn
from typer.testing import CliRunner

from dit import init, models
from dit.analysis import wakeup
from dit.cli import app
from dit.config import Params
from dit.diffusion import Diffusion
from dit.init import Strategy, named, named_strategies
from dit.models import Denoiser
from dit.models.dit.network import DiT
from dit.models.gradient_flow import orthogonalised, pattern_of
from dit.optim.optimizer import make_optimizer
from dit.sections.optim import AdamWParams, MuonParams, NamedOptimizerParams, OptimizerParams, SGDParams

SHAPES: list[dict[str, Any]] = [
    {"latent_size": 4, "latent_channels": 3, "patch_size": 2, "hidden_size": 32, "depth": 1, "num_heads": 2, "num_classes": 3},
    {"latent_size": 8, "latent_channels": 4, "patch_size": 4, "hidden_size": 48, "depth": 2, "num_heads": 3, "num_classes": 5},
    {"latent_size": 4, "latent_channels": 4, "patch_size": 2, "hidden_size": 64, "depth": 4, "num_heads": 4, "num_classes": 2},
    {"latent_size": 4, "latent_channels": 3, "patch_size": 4, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 3},
]
"""The last has one token, for which softmax has no choice."""
STEPS = 4


class Normalised(torch.optim.Optimizer):
    """Steps of one length along each tensor's gradient: linear as those of SGD, and never too small to be measured."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {})

    @torch.no_grad()
    def step(self) -> None:
        for weight in self.param_groups[0]["params"]:
            if weight.grad is not None and weight.grad.any():
                weight.sub_(0.1 * weight.grad / weight.grad.norm())


GROUPS = {"groups": ()}
MUON = {"momentum": 0.95, "nesterov": True, "adjust_lr_fn": "match_rms_adamw", "learning_rate_multiplier": 1.0}
ADAMW = AdamWParams(name="adamw", betas=(0.9, 0.999), weight_decay=0.1, **GROUPS)
OPTIMIZERS: dict[str, tuple[OptimizerParams, float]] = {
    "AdamW": (ADAMW, 1e-2),
    "SGD": (SGDParams(name="sgd", momentum=0.9, nesterov=True, weight_decay=0.1, **GROUPS), 0.1),
    "Muon": (
        MuonParams(name="muon", hidden="block", weight_decay=0.1, betas=(0.9, 0.999), adamw_weight_decay=0.1, **MUON, **GROUPS),
        1e-2,
    ),
}
"""Each with a learning rate. The schedule is measured without their weight decay."""


def measured(
    params: Params, strategy: Strategy, network: Denoiser, objective: str, optimizer: str, normalised: bool = False
) -> wakeup.Schedule:
    diffusion = Diffusion(params.diffusion.model_copy(update={"objective": objective, "learn_sigma": network.learn_sigma}))
    model = init.apply(network, strategy, seed=0).double()

    def loss(model: Denoiser, step: int) -> torch.Tensor:
        draws = torch.Generator().manual_seed(step)
        x0 = torch.randn(8, model.latent_channels, model.latent_size, model.latent_size, generator=draws)
        eps = torch.randn(x0.shape, generator=draws)
        t = torch.randint(0, 1000, (8,), generator=draws)
        y = torch.randint(0, model.num_classes + 1, (8,), generator=draws)
        x_t = diffusion.add_noise(x0, eps, t)
        return diffusion.loss(model(x_t.double(), t, y), x0, eps, t, x_t).total.mean()

    params_of_it, learning_rate = OPTIMIZERS[optimizer]
    made = Normalised(model) if normalised else make_optimizer(model, params_of_it, learning_rate, decays=False)
    return wakeup.schedule(wakeup.role_gradients(model, loss, made, STEPS))


def predicted(strategy: Strategy, network: nn.Module, optimizer: str = "AdamW") -> wakeup.Schedule:
    schedule = wakeup.predict(strategy, network, STEPS, OPTIMIZERS[optimizer][0])
    assert schedule is not None
    return schedule


def small_dit(shape: dict[str, Any], objective: str = "eps") -> DiT:
    return DiT(**shape, learn_sigma=objective == "eps")


@pytest.mark.parametrize("name", named_strategies())
def test_every_named_strategy_wakes_up_as_predicted(params: Params, name: str) -> None:
    cases = [(shape, "eps", optimizer) for shape in SHAPES for optimizer in OPTIMIZERS]
    for shape, objective, optimizer in [*cases, (SHAPES[0], "v", "AdamW")]:
        expected = predicted(named(name), small_dit(shape, objective), optimizer)
        found = measured(params, named(name), small_dit(shape, objective), objective, optimizer)
        assert found == expected, (shape, objective, optimizer)


MATRICES: list[dict[str, Any]] = [
    {"init": "zeros"},
    {"init": "constant", "value": 0.02},
    {"init": "xavier_uniform", "equal": "rows"},
    {"init": "xavier_uniform", "equal": "columns"},
    {"init": "identity"},
    {"init": "xavier_uniform"},
]
VECTORS: list[dict[str, Any]] = [
    {"init": "zeros"},
    {"init": "constant", "value": 0.02},
    {"init": "constant", "value": -1.0},
    {"init": "normal", "std": 0.1},
]
ONE_HEAD = {"latent_size": 4, "latent_channels": 3, "patch_size": 2, "hidden_size": 16, "depth": 2, "num_heads": 1}


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_prediction_holds_whatever_is_zero_constant_equal_or_an_identity(params: Params, data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([*SHAPES, {**ONE_HEAD, "num_classes": 3}]))
    paths = [role.path for role in dit_roles(shape["depth"])]
    groups = ["modulation.weight", "modulation.gate.weight", "qkv.value.weight", "mlp_in.weight", "mlp_out.weight", *paths]
    bias = data.draw(st.sampled_from([VECTORS[0], VECTORS[3]]))
    rules: list[dict[str, Any]] = [{"role": "all", "init": "xavier_uniform"}, {"role": "bias", **bias}]
    for role in data.draw(st.lists(st.sampled_from(groups), max_size=20)):
        rules.append({"role": role, **data.draw(st.sampled_from(MATRICES if role.endswith("weight") else VECTORS))})
    if data.draw(st.booleans()):
        rules += [
            {"role": "final.modulation.scale", "init": "zeros"},
            {"role": "scale.bias", "init": "constant", "value": -1.0},
        ]
    strategy = Strategy.model_validate({"rules": rules})
    optimizer = data.draw(st.sampled_from(list(OPTIMIZERS)))
    found = measured(params, strategy, small_dit(shape), "eps", optimizer, normalised=optimizer == "SGD")
    assert found == predicted(strategy, small_dit(shape), optimizer)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_values_that_are_an_identity_stay_centred_and_are_not_seen_by_equal_columns(params: Params, optimizer: str) -> None:
    rules = [
        {"role": "all", "init": "xavier_uniform"},
        {"role": "bias", "init": "zeros"},
        {"role": "qkv.query.weight", "init": "zeros"},
        {"role": "qkv.value.weight", "init": "identity"},
        {"role": "attn_out.weight", "init": "xavier_uniform", "equal": "columns"},
        {"role": ["modulation.shift", "modulation.scale"], "init": "zeros"},
    ]
    strategy = Strategy.model_validate({"rules": rules})
    schedule = predicted(strategy, small_dit(SHAPES[0]), optimizer)
    assert schedule["block[0].modulation.attn.gate.weight"] == 1
    assert schedule["block[0].attn_out.weight"] == 0
    assert measured(params, strategy, small_dit(SHAPES[0]), "eps", optimizer) == schedule


def test_a_number_is_what_float32_makes_of_it(params: Params) -> None:
    rules = [
        *named("adaln_zero").model_dump()["rules"],
        {"role": "final.projection.weight", "init": "constant", "value": 1e-46},
    ]
    zero = Strategy.model_validate({"rules": rules})
    assert predicted(zero, small_dit(SHAPES[0])) == predicted(named("adaln_zero"), small_dit(SHAPES[0]))
    minus_one = {"role": "final.modulation.scale.bias", "init": "constant", "value": -1.00000001}
    hidden = Strategy.model_validate({"rules": [*named("head_xavier").model_dump()["rules"], minus_one]})
    assert predicted(hidden, small_dit(SHAPES[0]))["patch_embed.weight"] == 1
    assert measured(params, hidden, small_dit(SHAPES[0]), "eps", "AdamW") == predicted(hidden, small_dit(SHAPES[0]))


FLAGS = ("use_qknorm", "use_swiglu", "use_rope", "use_rmsnorm", "wo_shift")
VARIANTS = list(itertools.product((False, True), repeat=5))
OFTEN = ("adaln_zero", "torch_default", "zero_residual_outputs", "symmetric", "symmetric_heads", "constant_head")


def lightning(variant: tuple[bool, ...]) -> Denoiser:
    sizes = {"latent_size": 4, "latent_channels": 3, "num_classes": 3, "hidden_size": 32, "depth": 2, "num_heads": 2}
    return models.build("LightningDiT-Micro/2", **sizes, learn_sigma=False, **dict(zip(FLAGS, variant, strict=True)))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda each: "".join(map(str, map(int, each))))
def test_every_lightning_dit_wakes_up_as_predicted(params: Params, variant: tuple[bool, ...]) -> None:
    for name in OFTEN:
        found = measured(params, named(name), lightning(variant), "flow", "AdamW")
        assert found == predicted(named(name), lightning(variant)), name


@pytest.mark.parametrize("name", named_strategies())
def test_every_named_strategy_wakes_up_lightning_dit_and_sit_as_predicted(params: Params, name: str) -> None:
    sizes = {"latent_size": 4, "latent_channels": 3, "num_classes": 3, "learn_sigma": False}
    for make in (lambda: lightning((False, True, True, True, False)), lambda: models.build("SiT-Micro/2", **sizes)):
        for optimizer in ("SGD", "AdamW"):
            assert measured(params, named(name), make(), "flow", optimizer) == predicted(named(name), make(), optimizer)


def test_muon_makes_of_each_part_of_a_fused_weight_what_the_prediction_says() -> None:
    width, draws = 24, torch.Generator().manual_seed(0)
    whole = torch.randn(width, width, generator=draws)
    parts = [
        torch.zeros_like(whole),
        torch.full_like(whole, 0.3),
        whole[:1].expand_as(whole),
        whole[:, :1].expand_as(whole),
        whole - whole.mean(1, keepdim=True),
        whole - whole.mean(0),
        whole,
    ]
    for three in itertools.product(parts, repeat=3):
        weight = torch.nn.Parameter(torch.zeros(3 * width, width))
        weight.grad = torch.cat(three)
        torch.optim.Muon([weight], lr=0.1, weight_decay=0.0).step()
        assert [pattern_of(part) for part in weight.detach().chunk(3)] == orthogonalised([pattern_of(part) for part in three])


def test_an_optimiser_that_is_not_understood_is_not_predicted_and_says_so() -> None:
    model, strange = DiT(**SHAPES[0], learn_sigma=True), NamedOptimizerParams(name="Adafactor", arguments={}, **GROUPS)
    assert wakeup.predict(named("adaln_zero"), model, STEPS, strange) is None
    assert "no prediction for Adafactor" in (wakeup.not_predicted(model, strange) or "")
    assert wakeup.not_predicted(model, NamedOptimizerParams(name="RAdam", arguments={}, **GROUPS)) is None


def test_the_published_schedule_is_head_then_gates_then_all() -> None:
    schedule = predicted(named("adaln_zero"), small_dit(SHAPES[1]))
    by_step: dict[int | None, set[str]] = {}
    for role, step in schedule.items():
        by_step.setdefault(step, set()).add(role)
    gates = {role for role in schedule if ".gate." in role}
    final = {role for role in schedule if role.startswith("final.modulation")}
    assert by_step[0] == {"final.projection.weight", "final.projection.bias"}
    assert by_step[1] == gates | final | {"patch_embed.weight", "patch_embed.bias"}
    assert by_step[None] == {"block[0].qkv.key.bias", "block[1].qkv.key.bias"}
    assert wakeup.awake(schedule) == 2
    assert wakeup.by_kind(schedule)["modulation.gate"] == 1
    assert wakeup.by_kind(schedule)["mlp_in"] == 2
    assert wakeup.awake(predicted(named("head_xavier"), small_dit(SHAPES[1]))) == 1


def test_a_network_that_can_never_learn_is_seen_without_running_it() -> None:
    dead = Strategy.model_validate({"rules": [{"role": "all", "init": "zeros"}]})
    schedule = wakeup.predict(dead, DiT(**SHAPES[0], learn_sigma=True), steps=50)
    assert schedule["block[0].qkv.query.weight"] is None
    assert wakeup.awake(schedule) is None


def test_a_single_precision_network_is_refused() -> None:
    model = DiT(**SHAPES[0], learn_sigma=True)
    with pytest.raises(ValueError, match="float64"):
        wakeup.role_gradients(model, lambda model, step: torch.zeros(()), make_optimizer(model, ADAMW, 1e-2), 1)


def test_the_command_shows_the_schedule_of_a_strategy_and_names_one_that_is_not_there() -> None:
    arguments = ["--params", str(Path(__file__).parents[1] / "params.yaml")]
    shown = CliRunner().invoke(app, ["wakeup", "adaln_zero", "--model", "DiT-XL/2", *arguments])
    assert shown.exit_code == 0, shown.output
    assert [line.split()[-1] for line in shown.output.splitlines()[-17:-1]] == list("1222222222221110")
    every = CliRunner().invoke(app, ["wakeup", *arguments], env={"COLUMNS": "200"})
    assert ["adaln_zero", *"1222222222221110"] in [line.split() for line in every.output.splitlines()]
    unknown = CliRunner().invoke(app, ["wakeup", "adaln_zer", *arguments])
    assert unknown.exit_code == 2
    assert "did you mean adaln_zero?" in unknown.output
