"""The figure of the stages in README: `python docs/figures/stages.py`. It draws the stages and dependencies of `dvc.yaml`."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib.pyplot as plt
import networkx

from dit import yamlfile

ROOT = Path(__file__).parents[2]
OUT = Path(__file__).with_suffix(".svg")
PLACES = {
    "design": (0, 0),
    "images": (1.3, 0),
    "autoencoder": (2.8, 0),
    "latents": (4.4, 0.6),
    "features": (4.4, -0.8),
    "train": (6.3, 0.6),
    "analyse": (6.3, 1.7),
    "evaluate": (8.3, -0.4),
    "compare": (10.3, 0.5),
}
"""Where each stage is drawn. Stage `best` is left out, since it only runs where a study samples its best runs alone."""
SOME = {"analyse": "one for each strategy", "train": "one for each run", "evaluate": "one for each run"}
"""Stages of which a study has many."""


def main() -> None:
    """Draw the figure."""
    plt.rcParams |= {"font.size": 10, "svg.hashsalt": "dit"}
    figure, axes = plt.subplots(figsize=(10, 3))
    boxes = {}
    for stage, place in PLACES.items():
        text = f"{stage}\n{SOME[stage]}" if stage in SOME else stage
        box = {"boxstyle": "round,pad=0.5", "facecolor": "#eef2fb", "edgecolor": "#3949ab"}
        boxes[stage] = axes.text(*place, text, ha="center", va="center", color="black", bbox=box).get_bbox_patch()
    for above, below in networkx.transitive_reduction(graph()).edges:
        style = {
            "arrowstyle": "-|>",
            "color": "#7a7f8a",
            "patchA": boxes[above],
            "patchB": boxes[below],
            "shrinkA": 2,
            "shrinkB": 2,
        }
        axes.annotate("", PLACES[below], PLACES[above], arrowprops=style)
    axes.set(xlim=(-0.6, 10.8), ylim=(-1.1, 2.2))
    axes.axis("off")
    figure.savefig(OUT, bbox_inches="tight", transparent=True, metadata={"Date": None})


def graph() -> networkx.DiGraph:
    """The drawn stages. A stage comes before those that read what it writes, or that name it in a pattern of `dvc.yaml`."""
    found = networkx.DiGraph()
    for name, stage in yamlfile.read(ROOT / "dvc.yaml")["stages"].items():
        if name not in PLACES:
            continue
        for file in stage.get("do", stage)["deps"]:
            found.add_edges_from((above, name) for above in PLACES if above != name and re.search(rf"\b{above}", file))
    return found


if __name__ == "__main__":
    main()
