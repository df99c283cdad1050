"""A law of the audit over generated networks, whose start is known: its verdict is right, or says why there is none."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from audit_networks import Transformer, adapt, batch
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from dit.audit import audit
from dit.errors import UserError


@dataclass
class Request:
    x: Tensor
    t: Tensor
    y: Tensor


@dataclass
class Answer:
    loss: Tensor
    prediction: Tensor


Pair = namedtuple("Pair", ["loss", "prediction"])

INPUTS = {
    "positional": lambda x, t, y: (x, t, y),
    "named": lambda x, t, y: {"x": x, "t": t, "y": y},
    "dict": lambda x, t, y: ({"x": x, "t": t, "y": y},),
    "nested": lambda x, t, y: ({"sample": [x], "cond": {"t": t, "y": y}},),
    "dataclass": lambda x, t, y: (Request(x, t, y),),
    "namespace": lambda x, t, y: (SimpleNamespace(x=x, t=t, y=y),),
}
OUTPUTS = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x, {"hidden": [x.detach() + 1]}),
    "loss first": lambda x: (x.new_ones(()), x),
    "dict": lambda x: {"loss": x.square().mean() + 1, "target": torch.ones_like(x).detach(), "prediction": x},
    "dataclass": lambda x: Answer(x.new_ones(()), x),
    "named tuple": lambda x: Pair(x.new_ones(()), x),
}
WRAPS = ("none", "compiled", "compiled in place", "checkpointed", "reentrant", "data parallel", "attributes")


class Generated(Transformer):
    """Takes and returns what `given` and `answers` say."""

    def __init__(self, given: str, answers: str, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.given, self.answers, self.wrap, self.depth = given, answers, "none", sizes["depth"]

    def run(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if self.wrap == "reentrant":
            c, x = self.conditioning(t, y), self.enter(x.transpose(1, 2))
            for block in self.blocks:
                x = checkpoint(block, x, c, use_reentrant=True)
            shift, scale = self.final(c)[:, None].chunk(2, -1)
            return self.leave(nn.functional.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift).transpose(1, 2)
        if self.wrap == "attributes":
            self.__dict__["blocks"] = [getattr(self, f"block{index}") for index in range(self.depth)]
        return super().run(x, t, y)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.given == "nested":
            x, t, y = args[0]["sample"][0], args[0]["cond"]["t"], args[0]["cond"]["y"]
        elif self.given in ("dict", "dataclass", "namespace"):
            held = args[0] if isinstance(args[0], dict) else vars(args[0])
            x, t, y = held["x"], held["t"], held["y"]
        else:
            x, t, y = args or (kwargs["x"], kwargs["t"], kwargs["y"])
        return OUTPUTS[self.answers](self.run(x, t, y))


def wrap(network: Generated, how: str) -> None:
    """What compiling, checkpointing and data parallelism make of blocks, or another place to keep them."""
    network.wrap = how
    blocks = list(network.blocks)
    if how == "compiled":
        network.blocks = nn.ModuleList(torch.compile(block, backend="eager") for block in blocks)  # type: ignore[misc]
    elif how == "compiled in place":
        for block in blocks:
            block.compile(backend="eager")
    elif how == "checkpointed":
        network.blocks = nn.ModuleList(checkpoint_wrapper(block) for block in blocks)
    elif how == "data parallel":
        network.blocks = nn.ModuleList(nn.DataParallel(block) for block in blocks)
    elif how == "attributes":
        del network.blocks
        for index, block in enumerate(blocks):
            network.add_module(f"block{index}", block)


def freeze(network: Transformer, what: str) -> None:
    """Take gradients from a part of the network."""
    if what == "embedders":
        network.time.requires_grad_(False)
        network.label.requires_grad_(False)
    elif what == "a block":
        network.blocks[0].requires_grad_(False)
    elif what == "all but the head":
        network.requires_grad_(False)
        network.leave.requires_grad_(True)


@settings(max_examples=100, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(
    sizes=st.fixed_dictionaries(
        {
            "zero": st.booleans(),
            "zero_head": st.booleans(),
            "depth": st.integers(1, 3),
            "width": st.sampled_from([16, 24, 32]),
            "in_place": st.booleans(),
        }
    ),
    inputs=st.sampled_from(list(INPUTS)),
    outputs=st.sampled_from(list(OUTPUTS)),
    how=st.sampled_from(WRAPS),
    lora=st.sampled_from(["none", "mixers", "modulation"]),
    frozen=st.sampled_from(["nothing", "embedders", "a block", "all but the head"]),
)
def test_the_verdict_is_right_or_refused_with_a_reason(
    sizes: dict[str, Any], inputs: str, outputs: str, how: str, lora: str, frozen: str
) -> None:
    torch.manual_seed(0)
    network = Generated(inputs, outputs, **sizes)
    if lora != "none":
        adapt(network, modulation=lora == "modulation")
    freeze(network, frozen)
    wrap(network, how)
    try:
        report = audit(network, INPUTS[inputs](*batch()), steps=2)
    except UserError:
        if how == "reentrant" and sizes["in_place"]:  # autograd refuses it, so that it cannot be trained at all
            return
        raise
    adaln_zero = sizes["zero"] and sizes["zero_head"]
    refused = report.reservations("adaln-zero")
    if refused:  # only one block of its class cannot be told from other modules where no list holds it
        assert how == "attributes"
        assert sizes["depth"] == 1
    assert report.output.zero == sizes["zero_head"]
    assert all(block.identity == sizes["zero"] for block in report.blocks)
    assert bool(report.reasons("adaln-zero")) <= (not adaln_zero)
    assert bool(refused) or bool(report.failures("adaln-zero")) == (not adaln_zero)
    name = "Undecided" if refused and not report.reasons("adaln-zero") else "adaLN-Zero" if adaln_zero else "Not adaLN-Zero"
    assert report.verdict.startswith(f"{name}: ")
