"""The figures of docs/zero-init.md: `make study`, then `python docs/figures/zero_init.py` in the same folder.

It reads `data/latents` and `runs/train`, computes the rest in seconds, writes SVG files beside itself, and prints the numbers
of sections 1 and 3.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.colors import ListedColormap

from dit import config, init
from dit.analysis import wakeup
from dit.analysis.signal import loss, network_signal
from dit.analysis.symmetry import distinct_units, factors
from dit.config import Params
from dit.data.batches import Batches
from dit.data.latents import LatentStore
from dit.design import design
from dit.diffusion import Diffusion
from dit.init import Strategy
from dit.models.dit.network import DiT
from dit.models.dit.probes import output_units

HERE = Path(__file__).parent
STEPS = 5
SIGMAS = np.array([0.0, 0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2])
WIDTHS = (128, 384)
SEEDS = 5


def main() -> None:
    """Draw every figure."""
    plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "dit"}
    params = config.load()
    store = LatentStore(Path("data/latents"))
    diffusion = Diffusion(params.diffusion)
    batches = Batches(store, diffusion, batch_size=64, label_dropout=params.model.label_dropout, seed=0)
    draw("wake-up", wake_up(params, network(params, store)))
    draw("factors", head_factors(params, network(params, store), batches, diffusion))
    draw("start", initial_error(params, store, batches, diffusion))
    draw("units", units_over_training(params))


def network(params: Params, store: LatentStore, width: int | None = None) -> DiT:
    """The study's network, or one of its depth and another width."""
    plain = params.network(store.sizes)
    if width is None:
        return plain
    return plain.resized(hidden_size=width, depth=plain.depth, num_heads=width // 32)


def wake_up(params: Params, plain: DiT) -> plt.Figure:
    """The first step with a gradient, predicted, for every strategy of the library and every kind of weight."""
    schedules = {name: wakeup.predict(strategy, plain, STEPS) for name, strategy in params.strategies.items()}
    table = pd.DataFrame({name: wakeup.by_kind(schedule) for name, schedule in schedules.items()}, dtype=float)
    figure, axes = plt.subplots(figsize=(9, 5))
    axes.imshow(table.to_numpy(), cmap=ListedColormap(["#bfe3cf", "#f5df9a", "#f0b27a", "#d98880"]), vmin=-0.5, vmax=3.5)
    for (row, column), step in np.ndenumerate(table.to_numpy()):
        axes.text(column, row, "-" if np.isnan(step) else f"{step:.0f}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(table.columns)), table.columns, rotation=60, ha="right")
    axes.set_yticks(range(len(table.index)), table.index)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return figure


def head_factors(params: Params, plain: DiT, batches: Batches, diffusion: Diffusion) -> plt.Figure:
    """Singular values of both factors of the head's gradient at step 0, and of the gradient itself."""
    head = init.apply(plain, "adaln_zero", 0).double().final_layer.linear
    inputs, deltas = factors(head, lambda: loss(plain, batches(0), diffusion))
    ranks = [int(torch.linalg.matrix_rank(matrix)) for matrix in (deltas, inputs, deltas.T @ inputs)]
    before = distinct_units(output_units(head))
    optimiser = torch.optim.AdamW(plain.parameters(), lr=params.train.learning_rate)
    loss(plain, batches(0), diffusion).backward()
    optimiser.step()
    after = distinct_units(output_units(head))
    print(f"ranks of delta, h and dL/dW: {ranks}; distinct rows of the head: {before}, after a step {after}")
    figure, axes = plt.subplots(figsize=(6, 3))
    for label, matrix in (
        ("h, the inputs of the head", inputs),
        (r"$\delta$, the loss gradient of its outputs", deltas),
        (r"$dL/dW = \delta^T h$", deltas.T @ inputs),
    ):
        values = torch.linalg.svdvals(matrix)
        axes.semilogy(range(1, len(values) + 1), values / values[0], marker=".", lw=1, label=f"{label} {tuple(matrix.shape)}")
    axes.set(xlabel="singular value", ylabel="relative to the largest", xlim=(0, 36), ylim=(1e-8, 2), title="Zero head, step 0")
    axes.legend(frameon=False)
    return figure


def initial_error(params: Params, store: LatentStore, batches: Batches, diffusion: Diffusion) -> plt.Figure:
    """Error at the start against the standard deviation of the head: formula and measurement."""
    figure, axes = plt.subplots(figsize=(6, 3))
    for colour, width in zip(("#3b7dd8", "#e0802b"), WIDTHS, strict=True):
        measured = []
        for sigma in SIGMAS:
            head = {"role": "final.projection.weight", "init": "normal", "std": float(sigma)}
            strategy = Strategy(rules=(*params.strategies["adaln_zero"].rules, head))
            networks = [init.apply(network(params, store, width), strategy, seed) for seed in range(SEEDS)]
            found = [network_signal(one, batches(seed), diffusion) for seed, one in enumerate(networks)]
            measured.append([one.mse for one in found])
        curve = np.linspace(0, SIGMAS.max(), 100)
        axes.plot(curve, 1 + curve**2 * width, color=colour, lw=1, label=rf"$1 + \sigma^2 D$, $D = {width}$")
        axes.plot(SIGMAS, measured, ".", color=colour, alpha=0.6)
    xavier = [init.apply(network(params, store), "head_xavier", seed) for seed in range(SEEDS)]
    starts = [network_signal(one, batches(seed), diffusion).mse for seed, one in enumerate(xavier)]
    print(f"head_xavier starts at {min(starts):.2f} to {max(starts):.2f}, over {SEEDS} seeds")
    axes.set(
        xlabel=r"$\sigma$ of the output projection",
        ylabel="mean squared error at step 0",
        yscale="log",
        title=f"Points: {SEEDS} seeds",
    )
    axes.legend(frameon=False)
    return figure


def units_over_training(params: Params) -> plt.Figure:
    """Distinct hidden units, and rows of the head, over the first run of each strategy."""
    runs = {run.strategy: run for run in reversed(design(params.study).runs)}.values()
    figure, axes = plt.subplots(1, 2, figsize=(8, 3))
    roles = {".mlp_in.weight": "hidden units of an MLP", "final.projection.weight": "rows of the head"}
    for panel, (role, title) in zip(axes, roles.items(), strict=True):
        for run in runs:
            table = pd.read_csv(Path("runs/train") / run.name / "diagnostics.csv")
            counts = table[table["role"].str.endswith(role)].groupby("step")["distinct_units"].mean()
            panel.plot(counts.index + 1, counts, marker=".", lw=1, label=run.strategy)
        panel.set(xscale="log", yscale="log", xlabel="optimiser step + 1", title=f"Distinct {title}")
    axes[0].legend(frameon=False, fontsize=7)
    return figure


def draw(name: str, figure: plt.Figure) -> None:
    """Write one figure, the same bytes for the same numbers."""
    figure.savefig(HERE / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    print(HERE / f"{name}.svg")


if __name__ == "__main__":
    main()
