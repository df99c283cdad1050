"""The figures of docs/gpu-study.md: `make study PROFILE=gpu WORKERS=8`, `dvc exp apply` of what it names, then
`python docs/figures/gpu_study.py` in the same folder.

It reads `runs` and `reports`, and writes curves, samples and the report's summary into `docs/gpu-study`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from PIL import Image, ImageDraw

OUT = Path(__file__).parents[1] / "gpu-study"
SHOWN = ("adaln_zero", "head_xavier", "symmetric")
LATE = 0.3
"""Share of the steps before which the average still holds the start."""
LABEL_HEIGHT = 18


def main() -> None:
    """Draw all of them."""
    plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "dit"}
    OUT.mkdir(exist_ok=True)
    summary = json.loads(Path("reports/summary.json").read_text())
    study = summary["study"]
    curves = validation(study["strategies"], study["seeds"])
    draw_curves(curves, study["strategies"], summary["baseline"]).savefig(
        OUT / "curves.svg", bbox_inches="tight", metadata={"Date": None}
    )
    samples(study["seeds"][0]).save(OUT / "samples.jpg", quality=85)
    shutil.copy("reports/summary.json", OUT)


def validation(strategies: list[str], seeds: list[int]) -> pd.DataFrame:
    """Validation errors of all runs: columns strategy, seed, step, weights, mse."""
    runs = [(strategy, seed) for strategy in strategies for seed in seeds]
    tables = [
        pd.read_csv(f"runs/train/{strategy}-{seed}/validation.csv").assign(strategy=strategy, seed=seed)
        for strategy, seed in runs
    ]
    return pd.concat(tables)[["strategy", "seed", "step", "weights", "mse"]]


def draw_curves(curves: pd.DataFrame, strategies: list[str], baseline: str) -> plt.Figure:
    """The error of the weights in training, and that of the averaged weights less the baseline's of the same seed."""
    figure, (whole, late) = plt.subplots(1, 2, figsize=(10, 3.6))
    for index, strategy in enumerate(strategies):
        found = curves[(curves["strategy"] == strategy) & (curves["weights"] == "model") & (curves["step"] > 0)]
        by_step = found.groupby("step")["mse"]
        whole.plot(by_step.mean(), color=f"C{index}", label=strategy)
        whole.fill_between(by_step.mean().index, by_step.min(), by_step.max(), color=f"C{index}", alpha=0.2, linewidth=0)
    averaged = curves[curves["weights"] == "ema"].pivot_table(index="step", columns=["strategy", "seed"], values="mse")
    for index, strategy in enumerate(strategies):
        percent = 100 * (averaged[strategy] / averaged[baseline] - 1)
        percent = percent[percent.index >= LATE * percent.index[-1]]
        late.plot(percent, color=f"C{index}", linewidth=0.6, alpha=0.6)
        late.plot(percent.mean(axis=1), color=f"C{index}", linewidth=2)
    whole.set(xscale="log", yscale="log", xlabel="optimiser step", title="Validation error (mean and range over seeds)")
    whole.legend(frameon=False)
    late.set(xlabel="optimiser step", title=f"EMA weights: difference to {baseline} in % (thin: one seed)")
    return figure


def samples(seed: int) -> Image.Image:
    """Grids of some strategies, one below the other: columns are classes, and noise is the same in all of them."""
    grids = [Image.open(f"runs/evaluate/{strategy}-{seed}/grid.png", formats=["PNG"]) for strategy in SHOWN]
    width, height = grids[0].size
    whole = Image.new("RGB", (width, len(grids) * (height + LABEL_HEIGHT)), "white")
    for row, (strategy, grid) in enumerate(zip(SHOWN, grids, strict=True)):
        top = row * (height + LABEL_HEIGHT)
        ImageDraw.Draw(whole).text((4, top + 3), strategy, fill="black")
        whole.paste(grid, (0, top + LABEL_HEIGHT))
    return whole


if __name__ == "__main__":
    main()
