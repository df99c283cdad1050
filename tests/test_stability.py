"""Spikes, recoveries and collapses are found where they are planted, and nowhere else; what may warn of them is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from dit import init
from dit.config import Params
from dit.data.latents import LatentStore
from dit.diffusion import Diffusion
from dit.models.dit.network import DiT
from dit.optim.optimizer import SecondMoment
from dit.sections.optim import MuonParams, NamedOptimizerParams, OptimizerParams
from dit.training import diagnosis, indicators, loop
from dit.training.attention import statistics
from dit.training.indicators import second_moment_ratios
from dit.training.loop import Trainer
from dit.training.records import Collapse, Event, Records, outcome
from dit.training.stability import COLLAPSE_STEPS, KEPT, RECOVERY_STEPS, WINDOW, Observation, Stability, observe
from pipelines.records.training import EVENTS, SPIKES, STABILITY

STEPS = 600
WITHIN = 20
"""Steps after its onset at which an event must be known."""

LARGE = 3.0
"""Times sixteen standard deviations: twice as far as a limit that is not known exactly."""

MUON = MuonParams(
    name="muon",
    hidden="block",
    momentum=0.95,
    nesterov=True,
    adjust_lr_fn="match_rms_adamw",
    learning_rate_multiplier=1.0,
    weight_decay=0.0,
    betas=(0.9, 0.99),
    adamw_weight_decay=0.0,
    groups=(),
)
NADAM = NamedOptimizerParams(name="NAdam", arguments={"betas": [0.9, 0.95], "eps": 1e-4}, groups=())

seeds = st.integers(0, 10_000)
noises = st.floats(0.02, 0.25)
onsets = st.integers(300, STEPS - 100)


def curve(seed: int, noise: float, *, final: float = 0.1, level: np.ndarray | float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Errors and gradient norms (STEPS,) of a run that falls from 1 to `final`, times `level`, with log-normal noise."""
    draws = np.random.default_rng(seed)
    step = np.arange(STEPS)
    error = final + (1 - final) * np.exp(-step / 20)
    norm = 0.05 + np.exp(-step / 20)
    return tuple(  # type: ignore[return-value]
        values * level * np.exp(noise * draws.standard_normal(STEPS)) for values in (error, norm)
    )


def seen(errors: Iterable[float], norms: Iterable[float]) -> list[Observation]:
    pairs = zip(errors, norms, strict=True)
    return [Observation(step, 1.05 * error, error, norm, 1e-3) for step, (error, norm) in enumerate(pairs)]


def judged(run: list[Observation], state: Stability | None = None) -> list[tuple[int, Event]]:
    """Every event, with the step at which it was known."""
    state = state or Stability(1.0)
    found = []
    for step in run:
        state, event, _ = observe(state, step)
        if event is not None:
            found.append((step.step, event))
    return found


@settings(max_examples=30, deadline=None)
@given(seeds, noises, st.floats(0.05, 0.8), st.floats(0, 1.5))
def test_noisy_falling_and_slowly_rising_runs_are_healthy(seed: int, noise: float, final: float, rise: float) -> None:
    rising = np.exp(rise * np.clip(np.arange(STEPS) - 200, 0, None) / (STEPS - 200))
    errors, norms = curve(seed, noise, final=final, level=rising if final * math.exp(rise) < 0.4 else 1.0)
    assert judged(seen(errors, norms)) == []


@settings(max_examples=30, deadline=None)
@given(seeds, noises, onsets, st.integers(1, 12), st.booleans())
def test_a_spike_and_its_recovery_are_found_at_their_steps(
    seed: int, noise: float, onset: int, length: int, only_norm: bool
) -> None:
    errors, norms = curve(seed, noise, final=0.01)
    spike = slice(onset, onset + length)
    norms[spike] *= LARGE * math.exp(16 * noise)
    if not only_norm:
        errors[spike] *= LARGE * math.exp(16 * noise)
    (spike_known, spiked), (recovery_known, recovered) = judged(seen(errors, norms))
    assert (spiked.kind, spiked.step, spike_known) == ("spike", onset, onset)
    assert (spiked.quantity == "gradient_norm") == only_norm
    assert spiked.value > spiked.reference
    assert (recovered.kind, recovered.step, recovery_known) == ("recovery", onset + length, onset + length + RECOVERY_STEPS - 1)
    assert recovered.value < recovered.reference == spiked.reference


@settings(max_examples=30, deadline=None)
@given(seeds, noises, onsets, st.floats(0.8, 1.5), st.booleans())
def test_a_collapse_is_known_within_twenty_steps(seed: int, noise: float, onset: int, level: float, warned: bool) -> None:
    errors, norms = curve(seed, noise)
    draws = np.random.default_rng(seed)
    errors[onset:] = level * np.exp(0.1 * draws.standard_normal(STEPS - onset))
    if warned:
        norms[onset - 10 :] *= np.exp(16 * noise * np.clip((np.arange(STEPS - onset + 10) + 1) / 10, 0, 1)) + 1
    known, event = next((known, event) for known, event in judged(seen(errors, norms)) if event.kind == "collapse")
    assert onset <= event.step <= onset + 1
    assert known < onset + WITHIN
    assert event.value > event.reference
    assert judged(seen(errors, norms))[-1][1] == event


def test_an_error_that_comes_down_again_is_a_recovery_from_the_collapse() -> None:
    errors, norms = curve(0, 0.1)
    errors[300:400] = 1.0
    kinds = [(event.kind, event.quantity, event.step) for _, event in judged(seen(errors, norms))]
    assert kinds == [("spike", "loss", 300), ("collapse", "mse", 300), ("recovery", "mse", 400)]


def test_a_run_that_learns_nothing_has_nothing_to_lose() -> None:
    errors, norms = curve(1, 0.1, final=1.0)
    assert judged(seen(errors, norms)) == []


def test_a_level_that_stays_is_learnt_as_the_new_one() -> None:
    errors, norms = curve(2, 0.05)
    norms[200:] *= 10
    norms[500] *= 10
    found = [(event.kind, event.step) for _, event in judged(seen(errors, norms))]
    assert found == [("spike", 200), ("spike", 500), ("recovery", 501)]
    assert WINDOW < 300


def test_norms_that_are_not_finite_are_left_to_loss_scaling() -> None:
    errors, norms = curve(3, 0.1)
    norms[250:255] = [math.inf, math.nan, math.inf, math.inf, math.nan]
    assert judged(seen(errors, norms)) == []


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(1, STEPS - 1))
def test_a_resumed_state_judges_as_the_whole_run(seed: int, cut: int) -> None:
    errors, norms = curve(seed, 0.1)
    errors[300:310] *= 8
    errors[450:] = 1.0
    run = seen(errors, norms)
    whole, resumed = Stability(1.0), Stability(1.0)
    for index, step in enumerate(run):
        if index == cut:
            resumed = Stability.from_state_dict(resumed.state_dict())
        (whole, *expected), (resumed, *found) = observe(whole, step), observe(resumed, step)
        assert found == expected
    assert resumed == whole


def test_the_steps_before_a_spike_are_kept_once_at_full_rate() -> None:
    errors, norms = curve(4, 0.05)
    for onset in (300, 320):
        errors[onset] *= 10
    state, kept = Stability(1.0), []
    for step in seen(errors, norms):
        state, _, rows = observe(state, step)
        kept += rows
    assert [row["step"] for row in kept] == list(range(300 - KEPT, 321))
    assert [row["event"] for row in kept] == [0] * (KEPT + 1) + [2] * 20
    assert kept[0] == {"event": 0, **vars(seen(errors, norms)[300 - KEPT])}


def test_the_share_of_clipped_steps_is_that_of_the_recent_ones() -> None:
    state = Stability(1.0)
    assert state.clipped_share(1.0) is None
    for step in seen([0.5] * 100, [0.5] * 68 + [2.0] * 32):
        state, _, _ = observe(state, step)
    assert state.clipped_share(1.0) == 32 / KEPT


SPIKE = {"event": 0, "step": 50, "kind": "spike", "quantity": "gradient_norm", "value": 3.0, "reference": 1.0}
COLLAPSE = {"event": 1, "step": 60, "kind": "collapse", "quantity": "mse", "value": 0.9, "reference": 0.5}
RECOVERY = {"event": 2, "step": 90, "kind": "recovery", "quantity": "mse", "value": 0.2, "reference": 0.5}


@pytest.mark.parametrize(
    ("events", "collapse"),
    [
        ([], None),
        ([SPIKE], None),
        ([SPIKE, COLLAPSE], Collapse(60, 0.9, 0.5, Event(**SPIKE))),  # type: ignore[arg-type]
        ([COLLAPSE], Collapse(60, 0.9, 0.5, None)),
        ([SPIKE, COLLAPSE, RECOVERY], None),
        ([COLLAPSE, SPIKE], Collapse(60, 0.9, 0.5, None)),
    ],
)
def test_a_run_has_collapsed_that_did_not_recover(events: list[dict[str, object]], collapse: Collapse | None) -> None:
    records = Records(metrics=[{"mse": 0.5}], validation=[{"mse": 1.0}] * 3, events=events)
    assert records.collapse == collapse
    ended = outcome(records, None, steps_done=100, parameters=1, target_second_moment=1.0)
    assert ended.status == ("collapsed" if collapse else "finished")
    assert (ended.final is None) == (collapse is not None)


Build = Callable[..., Trainer]


@pytest.fixture
def trainer(
    params: Params, latents: LatentStore, micro: Callable[..., DiT], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Build:
    """Builds a run of 100 steps, whose learning rate is far too high from step 60 on."""
    validation = params.train.validation.model_copy(update={"samples": 8})
    short = {"steps": 100, "batch_size": 8, "log_every": 5, "validate_every": 100, "checkpoint_every": 70, "diagnose_every": 30}
    monkeypatch.setattr(loop, "learning_rate", lambda _params, step: 3e-3 if step < 60 else 0.1)

    def build(scratch: str = "scratch", **changes: object) -> Trainer:
        settings = params.train.model_copy(update={"validation": validation, **short, **changes})
        network = init.apply(micro(), "adaln_zero", 0)
        diffusion = Diffusion(params.diffusion)
        return Trainer(network, latents, diffusion, settings, label_dropout=0.1, seed=0, scratch=tmp_path / scratch)

    return build


def test_a_run_that_collapses_says_when_and_what_preceded_it(trainer: Build, tmp_path: Path) -> None:
    run = trainer()
    run.run("run")
    collapse = run.records.collapse
    assert collapse is not None
    assert 60 <= collapse.step <= 60 + WITHIN
    assert collapse.spike is not None
    run.records.write(tmp_path)
    assert list(EVENTS.read(tmp_path)["kind"])[:2] == ["spike", "collapse"]
    assert SPIKES.read(tmp_path)["step"].max() == collapse.spike.step
    blocks = STABILITY.read(tmp_path)
    assert len(blocks) == 8 * 3  # steps 0 to 4, 30, 60 and 90; two blocks, and the rest


def test_a_collapsed_run_stops_where_it_is_told_to_and_a_resumed_one_ends_alike(
    trainer: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trainer("whole", stop_on_collapse=True)
    whole.run("whole")
    assert whole.records.collapse is not None
    assert whole.steps_done < 60 + WITHIN + COLLAPSE_STEPS
    killed = trainer(stop_on_collapse=True, checkpoint_every=66)
    train = killed._train
    monkeypatch.setattr(killed, "_train", lambda step: train(step) if step < 68 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        killed.run("killed")
    resumed = trainer(stop_on_collapse=True, checkpoint_every=66)
    resumed.run("resumed")
    assert resumed.records == whole.records
    assert resumed.stability == whole.stability
    assert all(torch.equal(whole.ema.tensors[name], resumed.ema.tensors[name]) for name in whole.ema.tensors)


def test_blocks_are_described_by_what_the_network_computes(trainer: Build) -> None:
    run = trainer(steps=3)
    batch = run.batches(0)
    x_t = run.diffusion.add_noise(batch.x0, batch.eps, batch.timesteps)
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    block = run.model.blocks[1]
    hooks = [
        block.attn.qkv.register_forward_hook(lambda *call: inputs.append(call[-1])),
        block.register_forward_hook(lambda *call: outputs.append(call[-1])),
    ]
    run.model(x_t, batch.timesteps, batch.labels)
    for hook in hooks:
        hook.remove()
    query, key, _ = inputs[0].unflatten(2, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(-1)
    run.run("run")
    found = next(row for row in run.records.stability if (row["step"], row["block"]) == (0, 1))
    assert found["max_attention_logit"] == pytest.approx((query @ key.mT / query.shape[-1] ** 0.5).abs().max().item(), rel=1e-5)
    assert found["attention_entropy"] == pytest.approx(-(weights * weights.log()).sum(-1).mean().item(), rel=1e-5)
    assert found["residual_rms"] == pytest.approx(outputs[0].square().mean().sqrt().item(), rel=1e-5)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_the_second_moment_ratio_is_that_of_the_adam_step(trainer: Build, clip: float | None) -> None:
    run = trainer(steps=4, gradient_clip=clip)
    run.run("run")  # which leaves the last gradient, clipped, and the second moments that it made
    for block in (0, None):
        squares, count = 0.0, 0
        for name, weight in run.model.named_parameters():
            if weight.requires_grad and name.startswith("blocks.0.") == (block == 0) and not name.startswith("blocks.1."):
                moment = run.engine.state_dict()["weights"][name]["exp_avg_sq"] / (1 - 0.999**4)
                squares += (weight.grad.square() / moment.clamp(min=1e-16)).sum().item()
                count += weight.numel()
        found = next(row for row in run.records.stability if (row["step"], row["block"]) == (3, block))
        assert found["second_moment_ratio"] == pytest.approx(math.sqrt(squares / count), rel=1e-3)
    assert {row["second_moment_ratio"] for row in run.records.stability if row["step"] == 0} == {None}
    assert found["clipped_share"] == (None if clip is None else 1.0)


@pytest.mark.parametrize("optimizer", [MUON, NADAM], ids=lambda each: each.name)
def test_second_moment_ratios_are_those_of_every_weight_that_has_a_second_moment(
    trainer: Build, optimizer: OptimizerParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(steps=3, optimizer=optimizer)
    run.run("run")
    moments = run.engine.second_moments()
    draws = torch.Generator().manual_seed(0)
    gradients: dict[str, torch.Tensor | None] = {
        name: 1e-3 * torch.randn(weight.shape, generator=draws) for name, weight in run.model.named_parameters()
    }
    gradients["blocks.1.mlp.fc1.bias"] = None
    squares: dict[int | None, list[torch.Tensor]] = {0: [], 1: [], None: []}
    for name, moment in moments.items():
        if (gradient := gradients[name]) is not None:
            block = int(name.split(".")[1]) if name.startswith("blocks.") else None
            clipped, updates = 0.5 * gradient, float(moment.updates) + 1
            coming = (moment.decay * moment.value + (1 - moment.decay) * clipped**2) / (1 - moment.decay**updates)
            squares[block] += [(clipped**2 / coming.clamp(min=moment.eps**2)).flatten()]
    expected = [torch.cat(parts).mean().sqrt().item() for parts in squares.values()]
    assert (optimizer is MUON) == (len(moments) < len(run.engine.state_dict()["weights"]))
    for chunk in (indicators.CHUNK, 100):
        monkeypatch.setattr(indicators, "CHUNK", chunk)
        found = second_moment_ratios(run.model, gradients, moments, torch.tensor(0.5))
        assert found.tolist() == pytest.approx(expected, rel=1e-3)


def test_a_graph_reads_no_count_of_updates_from_the_host() -> None:
    value = torch.zeros(3, device="meta")
    assert diagnosis.places({"a": SecondMoment(value, 0.999, torch.zeros((), device="meta"), 1e-8)}) is not None
    for updates in (torch.zeros(()), 1.0):
        assert diagnosis.places({"a": SecondMoment(value, 0.999, updates, 1e-8)}) is None


def test_graphs_are_made_after_the_first_step_and_anew_where_second_moments_are_elsewhere(
    trainer: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    class Captured:
        """Notes that a graph would be made."""

        def __init__(self, function: Callable[..., torch.Tensor]) -> None:
            made.append(run.steps_done)
            self.function = function

        def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
            return self.function(*inputs)

    monkeypatch.setattr(diagnosis, "Captured", Captured)
    run = trainer(steps=8, diagnose_every=1)
    run.diagnosis._capturable = True
    run.last_step = 4
    run.run("begun")
    assert made == [1, 1]
    run.restore(run._state())  # as from a checkpoint
    run.last_step = 8
    run.go_on("restored")
    assert made == [1, 1, 4, 4]


def test_entropy_is_the_logarithm_of_the_tokens_that_share_the_attention() -> None:
    queries, keys = torch.zeros(2, 3, 5, 4), torch.randn(2, 3, 7, 4)
    logit, entropy = statistics(queries, keys)
    assert logit.item() == 0
    assert entropy.item() == pytest.approx(math.log(7))
