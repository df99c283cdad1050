"""Equal units are counted as one, and the two factors of a layer's gradient tell which of them part and which never do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from dit import init
from dit.analysis.symmetry import UNIT_TOLERANCE, distinct_units, factors
from dit.config import Params
from dit.diffusion import Diffusion
from dit.models.dit.network import DiT
from dit.models.probes import attention_heads, mlp_units, output_units

Optimiser = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
OPTIMISERS: dict[str, Optimiser] = {
    "sgd": lambda weights: torch.optim.SGD(weights, lr=0.1),
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=1e-3),
}
optimisers = pytest.mark.parametrize("optimiser", OPTIMISERS.values(), ids=list(OPTIMISERS))


@pytest.fixture
def loss(params: Params) -> Callable[[DiT], Tensor]:
    """The training loss on one batch of random latents, drawn once."""
    diffusion, draws = Diffusion(params.diffusion), torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 16, 4, 8, 8, generator=draws)
    t, y = diffusion.draw_timesteps(16, draws), torch.randint(3, (16,), generator=draws)
    x_t = diffusion.add_noise(x0, eps, t)
    return lambda network: diffusion.loss(network(x_t, t, y), x0, eps, t, x_t).total.mean()


def four_heads(strategy: str) -> DiT:
    sizes = {"latent_size": 8, "patch_size": 2, "latent_channels": 4, "hidden_size": 64, "depth": 2, "num_heads": 4}
    return init.apply(DiT(**sizes, num_classes=3, learn_sigma=True), strategy, 0)


def steps(network: DiT, loss: Callable[[DiT], Tensor], optimiser: Optimiser, count: int) -> None:
    stepping = optimiser(list(network.parameters()))
    for _ in range(count):
        stepping.zero_grad()
        loss(network).backward()
        stepping.step()


def equal(columns: Tensor) -> bool:
    """Whether all columns (N, units) are the same, up to rounding, and not zero."""
    scale = columns.abs().max()
    return bool(scale > 0) and bool((columns - columns[:, :1]).abs().max() < 1e-4 * scale)


@pytest.mark.parametrize(("count", "width"), [(10, 6), (10, 600), (600, 6), (600, 600)])
def test_planted_duplicates_are_counted_once(count: int, width: int) -> None:
    units = torch.randn(count, width)
    units[7] = units[2] * (1 + 1e-5)
    units[8] = units[2]
    units[9] = units[2] * 1.01
    assert distinct_units(units) == count - 2
    units[4, 0] = torch.nan
    assert distinct_units(units) is None


@settings(deadline=None)
@given(st.integers(0, 100), st.integers(1, 40), st.integers(1, 100), st.integers(1, 3), st.floats(1e-6, 1e6))
def test_repeating_reordering_and_scaling_units_does_not_change_their_number(
    seed: int, count: int, width: int, times: int, scale: float
) -> None:
    draws = torch.Generator().manual_seed(seed)
    units = torch.randn(count, width, generator=draws)
    repeated = units.repeat(times, 1)[torch.randperm(count * times, generator=draws)]
    assert distinct_units(scale * repeated) == distinct_units(units)


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 30), st.integers(1, 16), st.floats(0, 1), st.sampled_from([0.9e-3, 1.1e-3, 0.1]))
def test_units_are_counted_by_the_distances_of_all_pairs(seed: int, count: int, width: int, zero: float, apart: float) -> None:
    draws = torch.Generator().manual_seed(seed)
    units = torch.nn.functional.normalize(torch.randn(count, width, generator=draws, dtype=torch.float64), dim=1)
    direction = torch.nn.functional.normalize(torch.randn(width, generator=draws, dtype=torch.float64), dim=0)
    twins = units + apart * direction  # as far from their units as the tolerance allows, or a little further
    units = torch.cat([units * (torch.rand(count, 1, generator=draws) >= zero), twins]).float()
    typical = units.double().norm(dim=1).sort().values[(len(units) - 1) // 2]
    different = [
        not any((one.double() - other.double()).norm() <= UNIT_TOLERANCE * typical for other in units[:index])
        for index, one in enumerate(units)
    ]
    assert distinct_units(units) == sum(different)


def test_units_that_are_mostly_zero_are_one_and_the_others() -> None:
    units = torch.zeros(9, 5)
    assert distinct_units(units) == 1
    units[2] = torch.arange(5.0)
    assert distinct_units(units) == 2


def test_a_network_that_is_drawn_at_random_has_no_equal_units() -> None:
    network = four_heads("head_xavier")
    for block in network.blocks:
        assert distinct_units(mlp_units(block.mlp)) == 256
        assert distinct_units(attention_heads(block.attn)) == 4
    assert distinct_units(output_units(network.final_layer.linear)) == 32


def test_the_factors_multiply_to_the_gradient(loss: Callable[[DiT], Tensor]) -> None:
    network = four_heads("adaln").double()
    layers = [network.final_layer.linear, network.blocks[0].mlp.fc1, network.blocks[1].attn.qkv, network.t_embedder.mlp[0]]

    def run() -> Tensor:
        torch.manual_seed(0)
        return network(torch.randn(6, 4, 8, 8).double(), torch.arange(6), torch.arange(6) % 3).pow(3).mean()

    torch.nn.init.normal_(network.final_layer.linear.weight)
    run().backward()
    for layer in layers:
        inputs, deltas = factors(layer, run)
        torch.testing.assert_close(deltas.T @ inputs, layer.weight.grad)
        torch.testing.assert_close(deltas.sum(0), layer.bias.grad)


def test_a_layer_that_takes_no_part_has_no_factors() -> None:
    with pytest.raises(ValueError, match="no part"):
        factors(torch.nn.Linear(2, 2), lambda: torch.zeros(()))


@optimisers
def test_a_zero_head_has_distinct_output_gradients_and_so_distinct_rows_after_one_step(
    loss: Callable[[DiT], Tensor], optimiser: Optimiser
) -> None:
    network = four_heads("adaln_zero")
    head = network.final_layer.linear
    assert distinct_units(output_units(head)) == 1
    inputs, deltas = factors(head, lambda: loss(network))
    assert distinct_units(deltas.T) == 32
    assert torch.linalg.matrix_rank(deltas.double()) == 32
    assert torch.linalg.matrix_rank(inputs.double()) > 1
    steps(network, loss, optimiser, 1)
    assert distinct_units(output_units(head)) == 32


@optimisers
def test_hidden_units_that_start_equal_have_equal_gradients_and_stay_one(
    loss: Callable[[DiT], Tensor], optimiser: Optimiser
) -> None:
    network = four_heads("symmetric")
    mlp = network.blocks[0].mlp
    before = mlp.fc1.weight.clone()
    for _ in range(4):
        steps(network, loss, optimiser, 5)
        assert equal(factors(mlp.fc1, lambda: loss(network))[1])
        assert distinct_units(mlp_units(mlp)) == 1
    assert not torch.allclose(mlp.fc1.weight, before)
    assert distinct_units(output_units(network.final_layer.linear)) == 32


@optimisers
def test_attention_heads_that_start_equal_have_equal_gradients_and_stay_one(
    loss: Callable[[DiT], Tensor], optimiser: Optimiser
) -> None:
    network = four_heads("adaln_zero")
    attention = network.blocks[0].attn
    with torch.no_grad():
        rows = attention.qkv.weight.unflatten(0, (3, 4, 16))
        rows.copy_(rows[:, :1].expand_as(rows))
        columns = attention.proj.weight.unflatten(1, (4, 16))
        columns.copy_(columns[:, :1].expand_as(columns))
    before = attention.qkv.weight.clone()
    for _ in range(4):
        steps(network, loss, optimiser, 5)
        deltas = factors(attention.qkv, lambda: loss(network))[1].unflatten(1, (3, 4, 16))
        for part in deltas.unbind(1):  # queries, keys, values: (N, heads, 16)
            assert equal(part.transpose(1, 2).flatten(0, 1))
        assert distinct_units(attention_heads(attention)) == 1
        assert distinct_units(attention_heads(network.blocks[1].attn)) == 4
    assert not torch.allclose(attention.qkv.weight, before)


def test_symmetric_units_part_as_soon_as_one_weight_differs(loss: Callable[[DiT], Tensor]) -> None:
    network = four_heads("symmetric")
    mlp = network.blocks[0].mlp
    with torch.no_grad():
        mlp.fc2.weight.copy_(torch.randn(mlp.fc2.weight.shape, generator=torch.Generator().manual_seed(0)) / 16)
    steps(network, loss, OPTIMISERS["adamw"], 5)
    assert distinct_units(mlp_units(mlp)) == 256
