"""Find out from DVC alone whether a study has nothing to do, before Prefect is imported and its server started.

The note that a study writes at its end is not trusted about results: DVC compares every stage. It only tells that `design.yaml`
belongs to the parameters, and that MLflow has the runs, unless its store has been written since.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from dit.checksums import sha256
from dit.errors import UserError
from pipelines import dag, services
from pipelines.files import write_json
from pipelines.mlflow_store import tracking_uri
from pipelines.redaction import shown
from pipelines.study_lock import BusyError, exclusively

if TYPE_CHECKING:
    from pipelines.tracking import Synced

NOTES = Path(".scratch/up-to-date.json")
LOCK = "dvc.lock"
FILES = ("params.yaml", "design.yaml", LOCK)


def note(root: Path, synced: Synced) -> None:
    """Write the note of a study once MLflow has its runs. Call this under the lock of the study."""
    if not (root / LOCK).exists():  # no stage has ended well
        return
    there = {"experiment": synced.experiment, "view": synced.view, "missing": len(synced.missing)}
    runs = len(synced.added) + len(synced.present)
    (root / NOTES).parent.mkdir(exist_ok=True)
    write_json(root / NOTES, {"files": _digests(root), "store": _store(), **there, "runs": runs})


def nothing_to_do(root: Path, targets: Collection[str] | None) -> list[str] | None:
    """Lines for the user if every stage that `targets` need is up to date; None if there is, or may be, something to do.

    Raises `BusyError` if another study runs, before anything is started for this one.
    """
    try:
        with exclusively(root):
            noted = json.loads((root / NOTES).read_text())
            if noted["files"] != _digests(root):
                return None
            stages = dag.select(dag.read(root), targets)
            if not all(stage.up_to_date for stage in stages.values()):
                return None
            return [f"nothing to do: {len(stages)} of {len(stages)} stages are up to date", *_results(root, stages, noted)]
    except BusyError:
        raise
    except (UserError, OSError, ValueError, LookupError, TypeError):  # the flow reports what is wrong, if anything is
        return None


def _results(root: Path, stages: Collection[str], noted: dict[str, Any]) -> Iterator[str]:
    """Where the report and the runs in MLflow are. If the store has been written since, missing runs are added to it."""
    if "compare" in stages:
        yield f"report: {(root / 'reports' / 'index.html').resolve().as_uri()}"
    uri = tracking_uri()
    if noted["store"] == _store() and noted["store"][1] is not None:
        waiting = f", {noted['missing']} not there yet" if noted["missing"] else ""
        yield f"MLflow experiment '{noted['experiment']}' in {shown(uri)}: {noted['runs']} runs are there{waiting}"
        view = noted["view"]
    else:
        from pipelines import tracking

        try:
            synced = tracking.sync(root)
        except UserError as error:
            yield str(error)
            return
        note(root, synced)
        yield str(synced)
        view = synced.view
    if view:
        yield services.mlflow_page(uri, view)


def _digests(root: Path) -> dict[str, str]:
    return {name: sha256(root / name) for name in FILES}


def _store() -> list[Any]:
    """MLflow's store, and the time of the last change and size of its file; None instead of these if it is a server."""
    uri = tracking_uri()
    file = Path(urlsplit(uri).path[1:]) if uri.startswith("sqlite:") else None
    state = [file.stat().st_mtime_ns, file.stat().st_size] if file and file.exists() else None
    return [shown(uri), state]
