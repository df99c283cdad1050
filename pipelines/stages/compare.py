"""Stage `compare`: all runs of the study in one report, with its numbers beside it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit import checksums
from dit.config import Params
from dit.data.images import load_images
from pipelines.design import Item, data_folder
from pipelines.files import complete_directory, write_json
from pipelines.report import dvc_plots
from pipelines.report.figures import figures
from pipelines.report.headline import Headline, headline
from pipelines.report.page import Autoencoder, render
from pipelines.report.reading import departed, read_study
from pipelines.report.runs import Study
from pipelines.report.summary import headline_metrics, summarise
from pipelines.stages.entry import run_dvc_stage


@dataclass(frozen=True)
class Report:
    """The report of a study, as a page and as numbers."""

    study: Study
    summary: dict[str, Any]
    words: Headline
    page: str


def compare(params: Params, item: Item) -> None:
    """Read exactly the runs of the study, drop others from the workspace, and write `reports`."""
    report = make_report(params)
    of_experiment = Path(".git").is_file()  # its worktree goes, and the user's runs stay: the flow names what there is to see
    for path in departed(report.study):
        shutil.rmtree(path)
        if not of_experiment:
            print(f"compare: removed {path}, which is no longer part of the study; DVC's cache keeps it")
    with complete_directory("reports", sealed=False) as out:
        write_json(out / "summary.json", report.summary)
        write_json(out / "metrics.json", headline_metrics(report.summary))
        dvc_plots.write_tables(out / "plots", report.study)
        (out / "plots.html").write_text(dvc_plots.template(), encoding="utf-8")
        (out / "index.html").write_text(report.page, encoding="utf-8")
    print(f"compare: {report.words.answer}".replace("\u202f", " "))  # a terminal has no narrow spaces
    if not of_experiment:
        print(f"compare: wrote {Path('reports/index.html').resolve().as_uri()}")


def make_report(params: Params, partial: str = "") -> Report:
    """Read exactly the runs of the study. If these are not all runs yet, the page shows the text `partial`."""
    study = read_study(params)
    shown = study.first.design
    images = load_images(data_folder(params, shown, "images"))
    autoencoder = read_autoencoder(Path(data_folder(params, shown, "autoencoder")))
    summary = summarise(study)
    counts, rejected = images.manifest["counts"], images.manifest["rejected"]
    described = {"counts": counts, "rejected": rejected, "classes": len(images.class_names)}
    summary |= {"autoencoder": autoencoder.metrics, "images": described}
    words = headline(study, summary)
    summary["headline"] = words.sentences
    drawn = figures(study, summary)
    page = render(study, summary, headline=words, figures=drawn, images=images, autoencoder=autoencoder, partial=partial)
    return Report(study, summary, words, page)


def read_autoencoder(directory: Path) -> Autoencoder:
    """Read what stage `autoencoder` wrote beside its model. Raises `DamagedError` for a file that was changed."""
    metrics, about, picture = (directory / path for path in ("metrics.json", "model/config.json", "reconstructions.png"))
    for path in (metrics, about, picture):
        checksums.verify(path)
    return Autoencoder(json.loads(metrics.read_text()), json.loads(about.read_text()), picture.read_bytes())


if __name__ == "__main__":
    run_dvc_stage(compare, "compare")
