"""The audit is right about networks that write in place, are wrapped, or pass containers; or it says what it misses."""

from __future__ import annotations

import functools
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from audit_networks import WIDTH, Block, LoRA, Transformer, batch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dit.audit import audit
from dit.errors import UserError

X, T, Y = batch()


# In place


def test_a_block_that_adds_in_place_is_compared_with_a_copy_of_its_input() -> None:
    """pytorch/pytorch#95617: a forward hook sees an input that an in-place operation has changed already."""
    random = audit(Transformer(zero=False, in_place=True), batch())
    assert not any(block.identity for block in random.blocks)
    assert random.failures("identity-blocks")
    audit(Transformer(in_place=True), batch()).expect("adaln-zero")


class Writing(Block):
    """Writes into the stream and returns nothing."""

    def forward(self, x: Tensor, c: Tensor) -> None:  # type: ignore[override]
        super().forward(x, c)


class Returnless(Transformer):
    """Its blocks return nothing."""

    def run(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c, x = self.conditioning(t, y), self.enter(x.transpose(1, 2))
        for block in self.blocks:
            block(x, c)
        return self.leave(x).transpose(1, 2)


@pytest.mark.parametrize("zero", [True, False])
def test_a_block_that_returns_nothing_is_judged_by_what_it_wrote(zero: bool) -> None:
    """vllm-project/vllm#24500: models whose residual additions are all in place."""
    network = Returnless()
    network.blocks = nn.ModuleList(Writing(WIDTH, zero, in_place=True) for _ in range(2))
    report = audit(network, batch())
    assert [block.identity for block in report.blocks] == [zero, zero]


class Greedy(Transformer):
    """Scales its sample, activates its timesteps and takes its labels out of the batch, all in place."""

    def forward(self, request: dict[str, Any]) -> Tensor:
        y = request.pop("y")
        return self.run(request["x"].mul_(0.5), nn.functional.silu(request["t"], inplace=True), y)


def test_what_a_network_writes_into_its_inputs_reaches_neither_the_caller_nor_the_next_pass() -> None:
    """neuro-galaxy/torch_brain#45: entries are popped from the batch in each step, and have to be put back."""
    request = {"x": X.clone(), "t": T.clone(), "y": Y.clone()}
    report = audit(Greedy(), (request,))
    report.expect("adaln-zero")
    assert {item.name: item.part for item in report.inputs} == {
        "request.x": "sample",
        "request.t": "timestep",
        "request.y": "label",
    }
    assert torch.equal(request["x"], X)
    assert torch.equal(request["t"], T)
    assert torch.equal(request["y"], Y)


# Wrappers inside


def test_a_module_compiled_in_place_is_audited_as_it_is_written() -> None:
    """huggingface/diffusers#11705: `compile_repeated_blocks` calls `compile` of every block, which leaves no wrapper to see."""
    network = Transformer()
    for block in network.blocks:
        block.compile(backend="eager")
    network.enter.forward = torch.compile(network.enter.forward, backend="eager")  # type: ignore[method-assign]
    before = [weight.clone() for weight in network.parameters()]
    audit(network, batch()).expect("adaln-zero")
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_a_forward_that_is_bound_to_the_original_network_is_refused() -> None:
    """facebookresearch/fairscale#816: a copy of a checkpoint-wrapped module calls the module that it was copied from."""
    network = Transformer()
    block = network.blocks[0]
    reference, forward = weakref.ref(block), type(block).forward

    def checkpointed(module: Any, *args: Tensor) -> Tensor:
        return checkpoint(functools.partial(forward, module()), *args, use_reentrant=False)

    block.forward = functools.partial(checkpointed, reference)  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"a copy of a function in blocks.0 would still call the original network"):
        audit(network, batch())


def test_a_method_that_hooks_have_replaced_calls_the_copy() -> None:
    """huggingface/accelerate#1971: after `dispatch_model` the forward of a copy still referred to the original."""
    network = Transformer()
    for module in network.modules():
        module._old_forward = module.forward  # type: ignore[assignment]
        module.forward = functools.partial(lambda module, *args: module._old_forward(*args), module)  # type: ignore[method-assign]
    report = audit(network, batch())
    report.expect("adaln-zero")
    assert {wake.step for wake in report.wakes if wake.tensor.startswith("leave")} == {0}
    assert not network.leave.weight.any()


class FullyShardedDataParallel(nn.Module):
    """What a shard looks like from outside."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_a_shard_of_the_weights_is_refused() -> None:
    """pytorch/pytorch#82070: a deep copy of an FSDP module fails."""
    network = Transformer()
    network.blocks[0] = FullyShardedDataParallel(network.blocks[0])
    with pytest.raises(UserError, match="holds a shard of the weights; gather its weights"):
        audit(network, batch())


@pytest.mark.parametrize("trained", [False, True])
def test_an_adapted_layer_is_one_layer_and_judged_by_what_it_does(trained: bool) -> None:
    network = Transformer()
    for block in network.blocks:
        block.ada[1] = LoRA(block.ada[1])  # type: ignore[index, operator, arg-type, union-attr]
        if trained:
            nn.init.normal_(block.ada[1].lora_B.weight)  # type: ignore[index, union-attr, arg-type, operator]
    report = audit(network, batch())
    assert [(layer.path, layer.state) for layer in report.modulation if layer.place == "block"] == [
        (f"blocks.{index}.ada.1", "random" if trained else "zero") for index in range(2)
    ]
    assert bool(report.failures("adaln-zero")) == trained


# Containers


class Loss(Transformer):
    """Returns its loss, its target and then its prediction."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        prediction = self.run(x, t, y)
        return (prediction - x).square().mean(), x * 2, {"prediction": prediction}


def test_the_prediction_is_the_tensor_of_the_samples_shape_that_weights_have_a_part_in() -> None:
    """analysiscenter/batchflow#757: outputs told by position, where the loss comes before the predictions."""
    report = audit(Loss(), batch())
    report.expect("adaln-zero")
    assert report.output.path == "[2].prediction"


class Only(Transformer):
    """Returns its loss alone."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.run(x, t, y).square().mean()


def test_a_network_that_returns_its_loss_alone_is_refused() -> None:
    with pytest.raises(UserError, match="returned only a number, which may be its loss"):
        audit(Only(), batch())


class Held(Transformer):
    """Takes everything in one object."""

    def forward(self, features: Any) -> Tensor:
        held = features if isinstance(features, dict) else vars(features)
        return self.run(held["x"], held["t"], held["y"])


@pytest.mark.parametrize("kind", [dict, SimpleNamespace])
def test_what_one_argument_holds_is_exchanged_leaf_by_leaf(kind: Any) -> None:
    """TylerYep/torchinfo#46: networks whose one argument is a dictionary of tensors."""
    report = audit(Held(), (kind(x=X, t=T, y=Y),))
    report.expect("adaln-zero")
    assert {layer.driven_by for layer in report.modulation} == {("features.t", "features.y")}


def test_conditioning_that_cannot_be_varied_is_said_to_be_so() -> None:
    class Bound(Transformer):
        def forward(self, x: Tensor) -> Tensor:
            return self.run(x, T.to(x), Y)

    report = audit(Bound(), (X,))
    assert report.verdict.startswith("Undecided: ")
    (reason,) = report.failures("adaln-zero")
    assert "conditioning cannot be varied (the sample is its only input), so no modulation can be seen" in reason
    report.expect("zero-output")
    assert audit(Bound(zero_head=False), (X,)).verdict.startswith("Not adaLN-Zero: ")


# Modulation by values


def test_a_frozen_embedder_is_no_modulation() -> None:
    """segments-ai/latent-diffusion-segmentation#4: the time embedding is frozen."""
    network = Transformer()
    network.time.requires_grad_(False)
    report = audit(network, batch())
    report.expect("adaln-zero")
    assert {layer.path.split(".")[0] for layer in report.modulation} == {"blocks", "final"}


class Detached(Transformer):
    """Cuts the gradient between its embedders and its blocks."""

    def conditioning(self, t: Tensor, y: Tensor) -> Tensor:
        return super().conditioning(t, y).detach()


def test_a_detached_embedder_is_no_modulation() -> None:
    """ali-vilab/TeaCache#26: what a custom network modulates with is a mixture of embedders, told apart by its values only."""
    report = audit(Detached(), batch())
    report.expect("adaln-zero")
    assert {layer.path.split(".")[0] for layer in report.modulation} == {"blocks", "final"}


class ByToken(Transformer):
    """A timestep for each token."""

    def conditioning(self, t: Tensor, y: Tensor) -> Tensor:
        return self.time(t[..., None]) + self.label(y)[:, None]

    def run(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c, x = self.conditioning(t, y), self.enter(x.transpose(1, 2))
        for block in self.blocks:
            shift, scale, gate, *_ = block.ada(c).chunk(6, -1)  # type: ignore[operator, union-attr]
            x = x + gate * block.mix[0](x * (1 + scale) + shift)  # type: ignore[index, operator]
        return self.leave(x).transpose(1, 2)


def test_modulation_by_token_is_not_seen_and_nothing_is_concluded_from_that() -> None:
    """Physical-Intelligence/real-time-chunking-kinetix#10: timesteps of (B, tokens), so that every token has its modulation."""
    report = audit(ByToken(), (X, T[:, None].repeat(1, X.shape[-1]), Y))
    assert report.verdict.startswith("Undecided: ")
    assert not report.reasons("adaln-zero")


def test_an_unregistered_part_is_named_and_nothing_is_concluded_from_the_rest() -> None:
    network = Transformer()
    network.__dict__["hidden"] = [nn.Linear(4, 4)]

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = [network]
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return self.parts[0](x, t, y) * self.scale

    report = audit(Outer(), batch())
    assert "which the network does not list among its modules and parameters" in report.verdict
    assert report.verdict.startswith("Undecided: ")


def test_a_network_that_answers_differently_each_time_is_refused() -> None:
    class Counting(Transformer):
        calls = 0

        def run(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            self.calls += 1
            return super().run(x, t, y) + self.calls

    with pytest.raises(UserError, match="gives different outputs for the same batch"):
        audit(Counting(), batch())


# Trained weights


def test_a_trained_network_is_recognised_by_its_statistics_and_a_fresh_one_is_not() -> None:
    torch.manual_seed(0)
    network = Transformer(zero_head=False)
    assert not audit(network, batch()).was_trained
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    targets = torch.randn(4, 4, 9)
    for _ in range(400):
        x, t = torch.randn(32, 4, 9), torch.rand(32)
        y = torch.randint(1, 5, (32,))
        noisy = (1 - t[:, None, None]) * targets[y - 1] + t[:, None, None] * x
        loss = (network(noisy, t, y) - x + targets[y - 1]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    report = audit(network, batch())
    assert report.was_trained
    assert report.verdict.startswith("Trained: ")
    assert "random" not in report.verdict
    assert any("the weights are trained" in reason for reason in report.failures("zero-output"))


# The report


def test_names_are_printed_as_they_are_and_a_terminal_acts_on_nothing_in_them(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    network = Transformer()
    network.register_parameter("[bold]wei\x1b[31mght", nn.Parameter(torch.zeros(2, 2)))
    report = audit(network, batch())
    Console(width=100).print(report)
    shown = capsys.readouterr().out
    assert "\x1b[31m" not in shown
    assert r"[bold]wei\x1b[31mght" in shown
    assert "How sure each finding is" in shown
