"""A function of a batch as one CUDA graph: all its kernels in one launch, so that the host's speed no longer matters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from dit.training.batches import Batch

WARM_UPS = 2
"""Calls before the capture: compilation, handles and workspaces belong to them."""


class Captured:
    """Calls `function` through a graph that is captured at the first call. Its output is overwritten by the next call.

    `function` must do the same at every call: no host synchronisation, no state of the host. Gradients stay at one address.
    """

    def __init__(self, function: Callable[[Batch], Tensor]) -> None:
        self.function = function
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: Batch) -> Tensor:
        """The function of `batch`."""
        inputs = [getattr(batch, field.name) for field in fields(batch)]
        if self.graph is None:
            self.inputs = [tensor.clone() for tensor in inputs]
            self._capture(Batch(*self.inputs))
        torch._foreach_copy_(self.inputs, inputs)
        assert self.graph is not None
        self.graph.replay()
        return self.output

    def _capture(self, batch: Batch) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self.function(batch)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = self.function(batch)
