"""The exponential moving average (EMA) of a network's weights, which validation, sampling and the saved run use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dit.distributed import local


class EMA:
    """average <- decay * average + (1 - decay) * weight, from the first step on; the average starts as the weights.

    `tensors` holds the averages by their names in the model's `state_dict`. Tensors that are not trained keep their values.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._weights: list[Tensor] = [local(weight) for weight in trained.values()]
        self._averages = [local(self.tensors[name]) for name in trained]

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the current weights."""
        torch._foreach_lerp_(self._averages, self._weights, 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block, the model holds the averaged weights."""
        with torch.no_grad():
            trained = [weight.clone() for weight in self._weights]
            torch._foreach_copy_(self._weights, self._averages)
            try:
                yield
            finally:
                torch._foreach_copy_(self._weights, trained)
