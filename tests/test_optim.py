"""Optimisers by name, parameter groups by role, and learning rates as pure functions of the step."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import ROOT
from hypothesis import given, strategies as st

from dit import config, init, models, yamlfile
from dit.analysis.signal import coordinate_check, width_exponent
from dit.config import Params
from dit.diffusion import Batch, Diffusion
from dit.errors import ConfigError
from dit.models.dit.network import DiT
from dit.optim.by_name import OUTSIDE
from dit.optim.fused import unserved
from dit.optim.groups import Multipliers, multipliers
from dit.optim.optimizer import LEARNING_RATE, Together, make_optimizer, set_learning_rate
from dit.optim.schedule import learning_rate
from dit.sections import TrainParams
from dit.sections.optim import NamedOptimizerParams, OptimizerParams, ParameterGroup

SHIPPED = yamlfile.read(ROOT / "params.yaml")
MUP = yamlfile.read(ROOT / "profiles" / "mup.yaml")["train.optimizer.groups"]
SGD = {"name": "sgd", "momentum": 0.9, "nesterov": False, "weight_decay": 0.0}
MUON = {
    "name": "muon",
    "hidden": "block",
    "momentum": 0.95,
    "nesterov": True,
    "adjust_lr_fn": "match_rms_adamw",
    "learning_rate_multiplier": 2.0,
    "weight_decay": 0.1,
    "betas": [0.9, 0.99],
    "adamw_weight_decay": 0.2,
}


def train_params(**changes: Any) -> TrainParams:
    """The shipped section with other values, checked with the whole file."""
    data = copy.deepcopy(SHIPPED)
    data["train"] |= changes
    return config.parse(data).train


def optimizer(**changes: Any) -> OptimizerParams:
    """The shipped optimiser with other values, or, with a name, another one."""
    return train_params(
        optimizer={"groups": [], **changes} if "name" in changes else SHIPPED["train"]["optimizer"] | changes
    ).optimizer


def factors(groups: list[dict[str, Any]], model: DiT) -> dict[str, Multipliers]:
    return multipliers([ParameterGroup.model_validate(group) for group in groups], models.roles(model))


def test_later_groups_override_earlier_ones_and_all_other_weights_keep_the_optimisers_values(micro: Callable[..., DiT]) -> None:
    groups = [
        {"role": "modulation", "learning_rate_multiplier": 0.1, "weight_decay_multiplier": 0},
        {"role": "final.modulation.weight", "learning_rate_multiplier": 3},
        {"role": ["qkv.query", "qkv.key", "qkv.value"], "weight_decay_multiplier": 2},
    ]
    found = factors(groups, micro())
    assert found["blocks.1.adaLN_modulation.1.bias"] == Multipliers(0.1, 0.0)
    assert found["final_layer.adaLN_modulation.1.weight"] == Multipliers(3.0, 1.0)
    assert found["blocks.0.attn.qkv.weight"] == found["blocks.1.attn.qkv.bias"] == Multipliers(1.0, 2.0)
    assert found["final_layer.linear.weight"] == Multipliers()


def test_a_base_fan_in_divides_the_learning_rate_by_the_width_and_keeps_its_product_with_the_decay(
    micro: Callable[..., DiT],
) -> None:
    found = factors([{"role": "mlp_out.weight", "base_fan_in": 128}, {"role": "mlp_in.weight", "base_fan_in": 128}], micro())
    assert found["blocks.0.mlp.fc2.weight"] == Multipliers(0.5, 2.0)  # 256 inputs
    assert found["blocks.0.mlp.fc1.weight"] == Multipliers(2.0, 0.5)  # 64 inputs


def test_groups_reach_every_step_and_one_group_of_torch_is_enough_without_them(micro: Callable[..., DiT]) -> None:
    model = micro()
    groups = [{"role": "bias", "learning_rate_multiplier": 0.5, "weight_decay_multiplier": 0}]
    made = make_optimizer(model, optimizer(groups=groups, weight_decay=0.3), 1.0)
    set_learning_rate(made, 0.01)
    by_weight = {weight: group for group in made.param_groups for weight in group["params"]}
    assert len(made.param_groups) == 2
    assert len(by_weight) == sum(weight.requires_grad for weight in model.parameters())
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            expected = (0.005, 0.0) if name.endswith("bias") else (0.01, 0.3)
            assert (by_weight[weight]["lr"], by_weight[weight]["weight_decay"]) == expected
    assert len(make_optimizer(model, optimizer(), 1.0).param_groups) == 1


def test_muon_takes_the_matrices_of_its_hidden_roles_and_adamw_the_rest(micro: Callable[..., DiT]) -> None:
    model = micro()
    made = make_optimizer(model, optimizer(**MUON, groups=[{"role": "modulation", "learning_rate_multiplier": 0.5}]), 1e-3)
    assert isinstance(made, Together)
    muon, adamw = made.parts
    names = {weight: name for name, weight in model.named_parameters()}
    hidden = {names[weight] for group in muon.param_groups for weight in group["params"]}
    assert hidden == {name for name in names.values() if name.startswith("blocks.") and name.endswith("weight")}
    assert {names[weight] for group in adamw.param_groups for weight in group["params"]} == set(names.values()) - hidden - {
        "pos_embed"
    }
    rates = {names[weight]: group[LEARNING_RATE] for group in made.param_groups for weight in group["params"]}
    assert rates["blocks.0.mlp.fc1.weight"] == 2.0
    assert rates["blocks.0.adaLN_modulation.1.weight"] == 1.0
    assert rates["blocks.0.adaLN_modulation.1.bias"] == 0.5
    assert rates["final_layer.linear.weight"] == 1.0


def test_any_class_of_torch_is_made_with_its_arguments_and_its_own_defaults(micro: Callable[..., DiT]) -> None:
    made = make_optimizer(micro(), optimizer(name="AdamW", arguments={"eps": 1e-6, "betas": [0.8, 0.9]}), 1e-3)
    assert isinstance(made, torch.optim.AdamW)
    group = made.param_groups[0]
    assert (group["eps"], tuple(group["betas"]), group["weight_decay"]) == (1e-6, (0.8, 0.9), 0.01)
    still = make_optimizer(micro(), optimizer(name="AdamW", arguments={"weight_decay": 0.3}), 1e-3, decays=False)
    assert still.param_groups[0]["weight_decay"] == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"name": "adma"},
            r"name = 'adma' is not an optimiser \(did you mean adamw\?\); expected one of adamw, sgd, muon, ASGD",
        ),
        ({"name": "LBFGS"}, r"name = 'LBFGS': it evaluates the loss several times a step; expected one of"),
        (
            {"name": "RAdam", "arguments": {"beta": 1}},
            r"arguments\.beta is not an argument of RAdam; expected one of betas, eps",
        ),
        (
            {"name": "RAdam", "arguments": {"lr": 1}},
            r"arguments\.lr must not be given: train\.learning_rate is the learning rate",
        ),
        ({"name": "RAdam", "arguments": {"betas": [0.9, 2]}}, r"arguments = .*: RAdam refuses them: Invalid beta parameter"),
        ({"groups": [{"role": "modulaton"}]}, r"groups\[0\]: role 'modulaton' names no weight.*did you mean modulation"),
        (
            {"groups": [{"role": "qkv.value"}]},
            r"groups\[0\]: role 'qkv.value' names only some rows of 'blocks.0.attn.qkv.weight'",
        ),
        ({**MUON, "hidden": "qkv.key.weight"}, r"hidden: role 'qkv.key.weight' names only some rows of 'blocks.0.attn"),
        ({**MUON, "hidden": "bias"}, r"hidden = 'bias' names no matrix; expected roles of weights"),
        (
            {"name": "Rprop", "groups": [{"role": "bias", "weight_decay_multiplier": 0}]},
            r"groups\[0\].weight_decay_multiplier = 0.0: Rprop has no weight decay",
        ),
    ],
)
def test_an_optimiser_that_cannot_be_made_is_refused_before_any_work(wrong: dict[str, Any], message: str) -> None:
    section = {"arguments": {}, **wrong} if wrong.get("name", "adamw") not in ("adamw", "muon") else wrong
    with pytest.raises(ConfigError, match=rf"params\.yaml: train\.optimizer\.{message}"):
        optimizer(**section)


def test_a_mistaken_name_is_one_message_and_a_missing_key_names_itself() -> None:
    with pytest.raises(
        ConfigError, match=r"train\.optimizer: name = 'adam': expected adamw, sgd or muon, or a class"
    ) as caught:
        optimizer(name="adam", betas=[0.9, 0.999], weight_decay=0.0)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ConfigError, match=r"train\.optimizer\.momentum is missing"):
        optimizer(name="sgd", nesterov=False, weight_decay=0.0)


def test_an_optimiser_that_cannot_be_sharded_is_refused_with_fsdp() -> None:
    adafactor = {"name": "Adafactor", "arguments": {}, "groups": []}
    assert train_params(optimizer=adafactor).optimizer.name == "Adafactor"
    with pytest.raises(
        ConfigError, match=r"train\.optimizer\.name = 'Adafactor' is not known to work on weights that are sharded"
    ):
        train_params(optimizer=adafactor, parallel="fsdp")


def test_the_fused_path_serves_adamw_and_names_what_it_does_not() -> None:
    assert unserved(optimizer(groups=MUP)) == ""
    model, cannot = (
        models.build("DiT-S/2", latent_size=8, latent_channels=4, num_classes=3, learn_sigma=True),
        unserved(optimizer(**SGD)),
    )
    chosen = [torch.device("cuda"), torch.bfloat16, "train", False]
    assert models.backend_for(model, "auto", *chosen) == "fused"
    assert models.backend_for(model, "auto", *chosen, cannot) == "compiled"
    with pytest.raises(ConfigError, match=r"train\.backend = 'fused'.*it cannot do train\.optimizer\.name = 'sgd'"):
        models.backend_for(model, "fused", *chosen, cannot)


SCHEDULES = st.one_of(
    st.builds(lambda warmup: {"name": "constant", "warmup_steps": warmup}, st.integers(0, 50)),
    st.builds(
        lambda name, warmup, final: {"name": name, "warmup_steps": warmup, "final_fraction": final},
        st.sampled_from(["linear", "cosine"]),
        st.integers(0, 50),
        st.floats(0, 1),
    ),
    st.builds(
        lambda warmup, decay, final: {"name": "wsd", "warmup_steps": warmup, "decay_steps": decay, "final_fraction": final},
        st.integers(0, 50),
        st.integers(1, 50),
        st.floats(0, 1),
    ),
)


@given(schedule=SCHEDULES, more=st.integers(1, 100), peak=st.floats(1e-6, 1.0))
def test_a_schedule_rises_to_the_learning_rate_stays_and_falls_without_a_jump(
    schedule: dict[str, Any], more: int, peak: float
) -> None:
    warmup, decay = schedule["warmup_steps"], schedule.get("decay_steps", 0)
    steps = warmup + decay + more
    params = train_of(schedule, steps, peak)
    rates = [learning_rate(params, step) for step in range(steps)]
    assert all(rate > 0 for rate in rates)
    assert max(rates) == peak == rates[max(0, warmup - 1)]
    turn = max(1, warmup)
    assert rates[:turn] == sorted(rates[:turn])
    assert rates[turn - 1 :] == sorted(rates[turn - 1 :], reverse=True)
    lengths = [warmup or steps, decay or steps - warmup]
    steepest = peak * max(1.6 / length for length in lengths)  # half a cosine is pi / 2 times as steep as a line
    assert all(abs(after - before) <= steepest for before, after in itertools.pairwise(rates))
    final = schedule.get("final_fraction", 1.0)
    assert learning_rate(params, steps) == pytest.approx(peak * final, abs=1e-12)
    assert learning_rate(params, steps + 7) == learning_rate(params, steps)


def train_of(schedule: dict[str, Any], steps: int, peak: float) -> TrainParams:
    return TrainParams.model_validate(SHIPPED["train"] | {"schedule": schedule, "steps": steps, "learning_rate": peak})


@given(warmup=st.integers(0, 50), step=st.integers(0, 100), peak=st.floats(1e-6, 1.0))
def test_a_constant_schedule_is_bit_for_bit_the_warm_up_of_old(warmup: int, step: int, peak: float) -> None:
    params = train_of({"name": "constant", "warmup_steps": warmup}, 60, peak)
    assert learning_rate(params, step) == peak * min(1.0, (step + 1) / max(1, warmup))


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (
            {"name": "cosine", "warmup_steps": 350, "final_fraction": 0},
            r"schedule\.warmup_steps = 350: expected less than steps = 350",
        ),
        (
            {"name": "wsd", "warmup_steps": 300, "decay_steps": 51, "final_fraction": 0},
            r"schedule\.warmup_steps = 300 and schedule\.decay_steps = 51: expected at most steps = 350 together",
        ),
        ({"name": "constant", "warmup_steps": 0, "final_fraction": 0}, r"train\.schedule\.final_fraction is not a known key"),
        ({"name": "step", "warmup_steps": 0}, r"train\.schedule\.name = 'step'.*'constant', 'linear', 'cosine', 'wsd'"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(schedule: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train_params(schedule=schedule)


def test_under_mup_the_prediction_moves_alike_at_every_width_and_under_plain_adamw_it_does_not(params: Params) -> None:
    diffusion, widths, steps = Diffusion(params.diffusion), (128, 256, 512), 3

    def batch(step: int) -> Batch:
        draws = torch.Generator().manual_seed(step)
        x0, eps = (torch.randn(8, 4, 8, 8, generator=draws) for _ in range(2))
        return Batch(x0, eps, torch.randint(0, 1000, (8,), generator=draws), torch.randint(0, 4, (8,), generator=draws))

    def exponent(chosen: OptimizerParams) -> float:
        networks = {width: init.apply(sized(width), "mup_dit", 0) for width in widths}
        found = coordinate_check(networks, batch, diffusion, lambda model: make_optimizer(model, chosen, 1e-3), steps)
        return width_exponent(found) or 0.0

    assert abs(exponent(optimizer(groups=MUP))) < 0.1
    assert exponent(optimizer()) > 0.5


def sized(width: int) -> DiT:
    shape = {"latent_size": 8, "latent_channels": 4, "num_classes": 3, "learn_sigma": True}
    return DiT(patch_size=2, depth=2, hidden_size=width, num_heads=width // 32, **shape)


def test_an_arbitrary_optimiser_keeps_its_section_as_written() -> None:
    found = optimizer(name="RAdam", arguments={"betas": [0.9, 0.99]})
    assert isinstance(found, NamedOptimizerParams)
    assert found.model_dump(mode="json") == {"groups": [], "name": "RAdam", "arguments": {"betas": [0.9, 0.99]}}


def test_an_optimiser_that_torch_does_not_have_is_one_function(
    micro: Callable[..., DiT], monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(params: Any, lr: float, momentum: float = 0.0, weight_decay: float = 0.0) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=lr / 2, momentum=momentum, weight_decay=weight_decay)

    monkeypatch.setitem(OUTSIDE, "half", half)
    made = make_optimizer(micro(), optimizer(name="half", arguments={"momentum": 0.5}), 1.0)
    assert made.param_groups[0]["momentum"] == 0.5
    with pytest.raises(
        ConfigError, match=r"arguments\.momenta is not an argument of half; expected one of momentum, weight_decay"
    ):
        optimizer(name="half", arguments={"momenta": 0.5})
