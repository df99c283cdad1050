"""A strategy at its start: its wake-up schedule, its signal, its first steps, and how its activations depend on width."""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn

from dit import init
from dit.analysis import wakeup
from dit.analysis.signal import Coordinates, Signal, coordinate_check, loss, network_signal
from dit.data.batches import Batches
from dit.data.latents import LatentStore
from dit.diffusion import Batch, Diffusion
from dit.init import Strategy
from dit.models import Denoiser, backbone_of
from dit.optim.optimizer import make_optimizer
from dit.sections import AnalyseParams
from dit.sections.optim import OptimizerParams

HEAD_SIZE = 64
"""Width of an attention head in the coordinate check, as in DiT-S, DiT-B and DiT-L."""

COORDINATE_DEPTH = 2
"""The number of blocks of the networks in the coordinate check."""

COORDINATE_SAMPLES = 8
"""How many samples of each batch the coordinate check uses; its networks are wide."""


@dataclass(frozen=True)
class EarlyStep:
    """Error and sensitivities of the network before optimiser step `step`."""

    step: int
    mse: float
    timestep_sensitivity: float
    label_sensitivity: float


@dataclass(frozen=True)
class Start:
    """What an `Examiner` found.

    `predicted` is None if the schedule cannot be predicted, and `not_predicted` then says why. `coordinates` is empty for a
    strategy that a checkpoint ties to one width, and for a backbone that cannot be built in other sizes.
    """

    predicted: wakeup.Schedule | None
    not_predicted: str | None
    gradients: list[wakeup.RoleGradient]
    signal: Signal
    early: list[EarlyStep]
    coordinates: list[Coordinates]

    @property
    def measured(self) -> wakeup.Schedule:
        """The wake-up schedule that was seen."""
        return wakeup.schedule(self.gradients)


class Examiner:
    """Examines strategies on one network, one data set and one objective; every strategy gets the same batches.

    `optimizer` takes the steps at `learning_rate` and keeps its parameter groups, but uses no weight decay, schedule or
    clipping.
    """

    def __init__(
        self,
        model: Denoiser,
        store: LatentStore,
        diffusion: Diffusion,
        params: AnalyseParams,
        *,
        label_dropout: float,
        learning_rate: float,
        optimizer: OptimizerParams,
    ) -> None:
        self.model = model
        self.diffusion = diffusion
        self.params = params
        self.learning_rate = learning_rate
        self.optimizer = optimizer
        size = params.batch_size
        self.batches = Batches(store, diffusion, batch_size=size, label_dropout=label_dropout, seed=params.seed)

    def __call__(self, strategy: Strategy) -> Start:
        """Examine one strategy."""
        tied = any(rule.init == "from_checkpoint" for rule in strategy.rules)
        return Start(
            predicted=wakeup.predict(strategy, self.model, self.params.steps, self.optimizer),
            not_predicted=wakeup.not_predicted(self.model, self.optimizer),
            gradients=self._wake_up(strategy),
            signal=network_signal(self._network(strategy), self.batches(0), self.diffusion),
            early=list(self._early(strategy)),
            coordinates=[] if tied else self._coordinates(strategy),
        )

    def _network(self, strategy: Strategy, model: Denoiser | None = None) -> Denoiser:
        return init.apply(deepcopy(model or self.model), strategy, self.params.seed).to(self.diffusion.device)

    def _optimiser(self, network: nn.Module) -> torch.optim.Optimizer:
        return make_optimizer(network, self.optimizer, self.learning_rate, decays=False)

    def _wake_up(self, strategy: Strategy) -> list[wakeup.RoleGradient]:
        network = self._network(strategy).double()
        return wakeup.role_gradients(
            network,
            lambda model, step: loss(model, self.batches(step), self.diffusion),
            self._optimiser(network),
            self.params.steps,
        )

    def _early(self, strategy: Strategy) -> Iterator[EarlyStep]:
        network = self._network(strategy)
        optimiser = self._optimiser(network)
        for step in range(self.params.steps):
            batch = self.batches(step)
            seen = network_signal(network, batch, self.diffusion)
            yield EarlyStep(
                step=step,
                mse=seen.mse,
                timestep_sensitivity=seen.timestep_sensitivity,
                label_sensitivity=seen.label_sensitivity,
            )
            if not math.isfinite(seen.mse):
                return
            optimiser.zero_grad()
            loss(network, batch, self.diffusion).backward()
            optimiser.step()

    def _coordinates(self, strategy: Strategy) -> list[Coordinates]:
        if not backbone_of(self.model).resizable:
            return []
        networks = {}
        for width in self.params.widths:
            model = self.model.resized(hidden_size=width, depth=COORDINATE_DEPTH, num_heads=width // HEAD_SIZE)
            networks[width] = self._network(strategy, model)
        return coordinate_check(networks, self._few, self.diffusion, self._optimiser, self.params.steps)

    def _few(self, step: int) -> Batch:
        return self.batches(step).first(COORDINATE_SAMPLES)
