"""Diagnoses a step: measures each role and each block of the network. On a GPU, it uses CUDA graphs for small networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dit.analysis.diagnostics import RoleProbe, RoleState
from dit.devices import is_nvidia
from dit.diffusion import Batch, Diffusion
from dit.fused.capture import Captured, side_by_side
from dit.models import backbone_of
from dit.optim.optimizer import SecondMoment
from dit.training.engines import Engine, clip_factor
from dit.training.indicators import SAMPLES, BlockState, activations, block_states, second_moment_ratios

MOST_CAPTURED = 2**27
"""Most parameters of a network whose diagnoses become CUDA graphs. A larger network keeps the GPU busy without graphs."""


@dataclass(frozen=True)
class Findings:
    """What a diagnosed step shows about every role, and about every block and the rest of the network."""

    roles: list[RoleState]
    blocks: list[BlockState]


Places = list[tuple[str, int, int]]
"""For each weight: its name, and the addresses of its second moment and its count of updates on the device."""


def places(moments: Mapping[str, SecondMoment]) -> Places | None:
    """The addresses from which a graph would read `moments`; None if a count of updates is on the host.

    A graph would use such a count as it was when the graph was recorded. `torch.optim` keeps counts on the host for optimisers
    by name, such as Adam.
    """
    found: Places = []
    for name, moment in moments.items():
        if not isinstance(moment.updates, Tensor) or moment.updates.device != moment.value.device:
            return None
        found.append((name, moment.value.data_ptr(), moment.updates.data_ptr()))
    return found


class Diagnosis:
    """Diagnoses steps of `model`, which `engine` trains. A diagnosis does not change the results of the run.

    A diagnosis consists of about a thousand small operations, which a GPU computes faster than the host can launch them. So the
    operations before the update are one CUDA graph, and the operations after it another. The graphs read weights, gradients and
    second moments at fixed addresses. These are known only after the first step, so the first step is diagnosed without graphs.
    If the addresses of second moments change, as after loading a checkpoint, new graphs are recorded.
    """

    def __init__(
        self, model: nn.Module, engine: Engine, diffusion: Diffusion, precision: torch.dtype, gradient_clip: float | None
    ) -> None:
        self.model = model
        self.engine = engine
        self.diffusion = diffusion
        self.precision = precision
        self.gradient_clip = gradient_clip
        self.probe = RoleProbe(model)
        self._moments: dict[str, SecondMoment] = {}
        self._gradients: list[Tensor | None] = []
        self._memory: list[Tensor] = []
        self._before: Callable[..., Tensor] = self._read_before
        self._after: Callable[..., Tensor] = self.probe.changes
        self._places: Places | None = None
        self._any_yet = False
        self._capturable = (
            is_nvidia(diffusion.device)
            and precision != torch.float16  # with loss scaling, the host decides whether to update the weights
            and backbone_of(model).capturable
            and sum(weight.numel() for weight in model.parameters()) <= MOST_CAPTURED
        )

    def __call__(
        self, batch: Batch, gradient_norm: Tensor, clipped_share: float | None, update: Callable[[], None]
    ) -> Findings:
        """Diagnose the step that `update` takes. The engine must already hold the gradients of `batch`, with `gradient_norm`.

        `clipped_share` is copied into the findings. The host waits for the device once, at the end.
        """
        self._moments = self.engine.second_moments()
        stepped = bool(self._moments) or self._any_yet
        found = places(self._moments) if self._capturable and stepped else None
        if found is not None and found != self._places:
            self._before, self._after = Captured(self._read_before), Captured(self.probe.changes)
            self._places = found
        self._any_yet = True
        captured = isinstance(self._before, Captured)
        self._gradients = self._held(self.engine.weight_gradients(), captured)
        before = self._before(*vars(batch).values(), gradient_norm)
        update()
        read = torch.cat([before, self._after()]).tolist()
        if not captured:
            self.probe.forget()
            self._gradients = []
        of_blocks = 4 * (len(backbone_of(self.model).blocks(self.model)) + 1)
        return Findings(self.probe.states(read[of_blocks:]), block_states(read[:of_blocks], clipped_share))

    def _held(self, gradients: list[Tensor | None], captured: bool) -> list[Tensor | None]:
        """The gradients in float32; if they are for a graph (`captured`), always at the same addresses."""
        if not captured:
            return [None if gradient is None else gradient.float() for gradient in gradients]
        found = [gradient for gradient in gradients if gradient is not None]
        if not self._memory:
            self._memory = [torch.empty_like(gradient, dtype=torch.float32) for gradient in found]
        torch._foreach_copy_(self._memory, found)
        memory = iter(self._memory)
        return [None if gradient is None else next(memory) for gradient in gradients]

    def _read_before(self, *given: Tensor) -> Tensor:
        *parts, gradient_norm = given
        batch = Batch(*parts)
        some = batch.first(SAMPLES)
        x_t = self.diffusion.add_noise(some.x0, some.eps, some.timesteps)
        gradients = dict(zip(self.probe.weights, self._gradients, strict=True))
        factor = clip_factor(gradient_norm, self.gradient_clip)
        found = side_by_side(
            lambda: activations(self.model, (x_t, some.timesteps, some.labels), self.precision),
            lambda: second_moment_ratios(self.model, gradients, self._moments, factor),
            lambda: self.probe.norms(self._gradients),
            lambda: self.probe.symmetry(batch.timesteps, batch.labels),
        )
        return torch.cat(found)
