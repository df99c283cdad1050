"""Runs a function of tensors as one CUDA graph: the host launches all its kernels at once, so its speed no longer matters."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dit.devices import is_nvidia

WARM_UPS = 2
"""Number of calls before the capture, in which kernels are compiled and handles and workspaces are created."""


@dataclass(frozen=True)
class _Graph:
    inputs: list[Tensor]
    output: Tensor
    graph: torch.cuda.CUDAGraph


def captured(function: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """`Captured(function)` on an NVIDIA GPU; on other devices `function` itself."""
    return Captured(function) if is_nvidia(device) else function


class Captured:
    """Calls `function` through a CUDA graph, which the first call with inputs of the same shapes captures.

    Each call overwrites the output of the call before. `function` must do the same at every call: it must not synchronise with
    the host or depend on state of the host. Gradients keep their addresses.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.graphs: dict[tuple[torch.Size, ...], _Graph] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        """`function(*inputs)`."""
        shapes = tuple(tensor.shape for tensor in inputs)
        if shapes not in self.graphs:
            self.graphs[shapes] = self._capture([tensor.clone() for tensor in inputs])
        captured = self.graphs[shapes]
        if inputs:
            torch._foreach_copy_(captured.inputs, list(inputs))
        captured.graph.replay()
        return captured.output

    def _capture(self, inputs: list[Tensor]) -> _Graph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self.function(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with _without_garbage_collection(), torch.cuda.graph(graph):
            output = self.function(*inputs)
        return _Graph(inputs, output, graph)


def side_by_side(*functions: Callable[[], Tensor]) -> list[Tensor]:
    """The results of the functions. While a graph is captured, they become branches, which a GPU can run at the same time.

    No function may change what another function reads, and all tensors that they read must stay alive until all have returned.
    """
    if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return [function() for function in functions]
    here = torch.cuda.current_stream()
    branches = [torch.cuda.Stream() for _ in functions]
    found = []
    for branch, function in zip(branches, functions, strict=True):
        branch.wait_stream(here)
        with torch.cuda.stream(branch):
            found.append(function())
    for branch in branches:
        here.wait_stream(branch)
    return found


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Collect garbage before the block, and not within it.

    Garbage may contain the CUDA graphs of an earlier network, and freeing a graph during a capture invalidates the capture.
    """
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
