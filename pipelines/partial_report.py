"""The report of the first seed only, made while other seeds run: `python -m pipelines.partial_report FILE`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from dit import design as designs
from dit.config import load
from pipelines.stages.compare import make_report
from pipelines.stages.entry import exit_codes

NICE = 10
"""The niceness of this process, so that running stages come first."""


def write(out: Path) -> None:
    """Write the report of all runs of the first seed, which says that it is partial, to `out`: complete or not at all."""
    params = load()
    seed, *later = params.study.seeds
    sample = "all" if params.study.sample == "all" else "none"
    first = params.with_values({"study.seeds": [seed], "study.choose_on": [], "study.sample": sample})
    count, total = (len(designs.design(each.study).runs) for each in (first, params))
    others = f"seed{'s' if len(later) > 1 else ''} {', '.join(map(str, later))}"
    told = (
        f"Partial report: {count} of {total} runs, those of seed {seed}. The runs of {others} are still to come, so nothing "
        "here is final; the full report replaces this page when the study ends."
    )
    page = make_report(first, told).page
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(out)


if __name__ == "__main__":
    os.nice(NICE)
    with exit_codes():
        write(Path(sys.argv[1]))
