"""Pre-flight of a study: the checks of `dit.preflight`, and those of the workflow: remote, tracking server, DVC's cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir
from pathlib import Path
from typing import TYPE_CHECKING

from dit import config, preflight
from dit.config import Params
from dit.errors import UserError
from dit.preflight import Finding, resources
from dit.preflight.deadline import within
from dit.preflight.subject import Subject
from dit.terminal import plain
from pipelines import named_files
from pipelines.redaction import redacted, shown

if TYPE_CHECKING:
    from pipelines.dag import Stage

WHAT = "workflow"
ANSWER_SECONDS = 5.0
"""How long a remote, or a tracking server, may take to answer."""
READ_BY = {
    "images": {"images"},
    "autoencoder": {"autoencoder"},
    "features": {"features", "evaluate"},
    "evaluate": {"evaluate"},
    "strategies": {"analyse", "train"},
}
"""For each section of the parameters, the stages that read the files that it names."""


def refusal(workspace: Path, stages: Mapping[str, Stage], warn: Callable[[str], None]) -> str:
    """Why a study cannot run: a line for each thing that its stages would refuse later; empty if there is nothing.

    Only files that stages need that are not up to date are opened. `warn` gets a line for each thing that may go wrong.
    """
    running = {name.partition("@")[0] for name, stage in stages.items() if not stage.up_to_date}
    if not running:
        return ""
    params = config.load(workspace / "params.yaml")
    findings = _findings(workspace, params, running)
    if preflight.errors(findings):  # the errors may concern only stages whose results DVC can restore
        fewer = _without_results(workspace, params, stages)
        findings = findings if fewer is None else fewer
    for finding in findings:
        if finding.severity == "warning":
            warn(plain(str(finding)))
    return "\n".join(f"params.yaml: {plain(str(finding))}" for finding in preflight.errors(findings))


def _findings(workspace: Path, params: Params, running: set[str]) -> list[Finding]:
    with chdir(workspace):  # where stages read relative paths
        found = preflight.check(params, "params.yaml", running)
    return preflight.merged(found, check(workspace, params, running))


def _without_results(workspace: Path, params: Params, stages: Mapping[str, Stage]) -> list[Finding] | None:
    """The findings if only stages run whose results are not in DVC's cache; None if the cache has no results.

    The findings also say if the study could run after `dvc pull` had brought results from a remote.
    """
    from dvc.exceptions import DvcException

    from pipelines import restorable

    try:
        had = restorable.results(workspace, params, stages)
    except DvcException:  # for example, another program uses a file
        return None

    def running(besides: frozenset[str]) -> set[str]:
        return {name.partition("@")[0] for name, stage in stages.items() if not stage.up_to_date and name not in besides}

    findings = _findings(workspace, params, running(had.cached)) if had.cached else None
    if had.elsewhere and not preflight.errors(_findings(workspace, params, running(had.cached | had.elsewhere))):
        count = len(had.elsewhere)
        found = f"has {count} result{'s' * (count > 1)} that DVC's cache on this machine lacks, and that would do instead"
        told = Finding(WHAT, "dvc.lock", found, "`dvc pull`, where a remote has them", "error")
        return [*(findings or _findings(workspace, params, running(frozenset()))), told]
    return findings


def check(root: Path, params: Params, stages: set[str] | None = None) -> list[Finding]:
    """The findings about the workflow in `root`; none without a DVC project. `dit check` calls this too."""
    if not (root / ".dvc").is_dir():
        return []
    from pipelines import private_dvc

    private_dvc.keep(root)
    return [*_not_here(root, params, stages), *_dvc(root, params, stages), *_tracking()]


def _not_here(root: Path, params: Params, stages: set[str] | None) -> Iterator[Finding]:
    """Files that parameters name and DVC tracks, but that are missing in the folder, or only partly there."""
    named = [(key, path) for key, path in named_files.named_anywhere(params) if _read(key, stages)]
    keys = {path: key for key, path in reversed(named)}
    if not keys:
        return
    from pipelines import restorable

    for each in restorable.tracked(root, keys):
        where = f"{keys[each.path]} = {each.path}"
        brings = f"`dvc {'checkout' if each.cached else 'pull'} {each.targets}`, which brings it"
        if not each.here:
            yield Finding(WHAT, where, "tracked by DVC, and not here yet", brings, "error")
        else:
            found = f"holds {each.here:,} files, and DVC tracks {each.recorded:,}"
            yield Finding(WHAT, where, found, f"all of them ({brings}), or `dvc add` of what is here", "warning")


def _read(key: str, stages: set[str] | None) -> bool:
    """Whether any of `stages` reads the file that this key names."""
    return stages is None or bool(READ_BY[key.partition(".")[0]] & stages)


def _dvc(root: Path, params: Params, stages: set[str] | None) -> Iterator[Finding]:
    """Check the default remote, if there is one, and the disk of the cache, if it is not the disk of the folder."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(root)) as repo:
            cache = Path(repo.cache.local_cache_dir)
            name = repo.config["core"].get("remote")
            if name:
                yield _remote(repo, name)
    except DvcException as error:
        where = f"{root / '.dvc' / 'config'}"
        yield Finding(WHAT, where, " ".join(str(error).split()), "a configuration that DVC can read", "warning")
        return
    existing = next(each for each in (cache, *cache.parents) if each.exists())
    needs = resources.disk(Subject.of(params, "params.yaml", stages))
    if needs and os.stat(existing).st_dev != os.stat(root).st_dev:
        yield resources.on_disk(needs, cache)


def _remote(repo: object, name: str) -> Finding:
    """Whether the DVC remote answers. A study runs without it, but its results cannot be shared."""
    url = repo.config["remote"][name]["url"]  # type: ignore[attr-defined]
    where = f"DVC remote {name} = {shown(url)}"
    expected = "a remote that can be reached; the study runs without it, `dvc push` and `dvc pull` do not"

    def ask() -> bool:
        remote = repo.cloud.get_remote(name)  # type: ignore[attr-defined]
        parent = remote.fs.parent(remote.path)
        return bool(remote.fs.exists(remote.path) or remote.fs.exists(parent))

    try:
        there = within(ANSWER_SECONDS, "it", ask)
    except Exception as error:  # each kind of remote has its own library, with its own errors
        return Finding(WHAT, where, redacted(" ".join(str(error).split()), url)[:200], expected, "warning")
    return Finding(WHAT, where, "answers") if there else Finding(WHAT, where, "not there", expected, "warning")


def _tracking() -> Iterator[Finding]:
    """Whether MLflow's store answers. A study runs without it, and its runs can be added later."""
    from pipelines import mlflow_store

    uri = mlflow_store.tracking_uri()
    where = f"MLFLOW_TRACKING_URI = {shown(uri)}"
    try:
        mlflow_store.within(ANSWER_SECONDS, uri, lambda: mlflow_store.probe(uri))
    except UserError as error:
        yield Finding(WHAT, where, str(error), severity="warning")
    else:
        yield Finding(WHAT, where, "answers")
