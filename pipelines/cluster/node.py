"""How a node runs a stage: it clones the study, pulls the inputs, runs `dvc repro --single-item`, and pushes the outputs.

The node keeps everything in one folder, `DIT_WORK`: clones by commit, each used by one stage at a time, and one DVC cache for
all clones. In a study without a remote, the clones use the head's DVC cache instead.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from dvc.config import Config
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.stage.cache import _get_cache_hash, _get_stage_hash
from dvc.stage.serialize import to_single_stage_lockfile

from dit.errors import UserError
from pipelines import dag, disk
from pipelines.cluster import snapshot, voices
from pipelines.cluster.checkpoints import Mirror, Place
from pipelines.cluster.transport import Remote, UnreachableError

WORK = "DIT_WORK"
"""The environment variable that names the folder of a node."""
DEFAULT_WORK = Path("~/.cache/dit-init-lab")
DESIGN = "design.yaml"
STUDIES, SCRATCH = "studies", "scratch"
FOLDER = Path(".scratch/cluster")
"""The head's folder for files about clusters. In a study without a remote, it holds the snapshots of the code."""
THREADS = "OMP_NUM_THREADS"
"""A variable that Ray sets for its workers. Stages run without it, since their parameters say how many threads they use."""
MOST_TOLD = 5


@dataclass(frozen=True)
class Shared:
    """Folders of the head that all nodes see under the same path, so no results have to be copied to the nodes."""

    root: str
    """The folder on the head in which the study was started."""
    cache: str
    """The head's DVC cache, which the nodes use too."""

    def check(self, commit: str) -> None:
        """Raises `UserError` if this node does not see the folders, or the snapshot of `commit` in them."""
        for path in (Path(self.root, FOLDER, f"{commit}.bundle"), Path(self.cache)):
            if not path.exists():
                raise UserError(
                    f"{path} not found: the study has no DVC remote, so this node must see the head's files; mount their "
                    "folder here, or give the study a remote by `dvc remote add --default NAME URL`"
                )


@dataclass(frozen=True)
class Study:
    """What a node must know of a study. The head sends it with each stage."""

    commit: str
    remote: Remote | None
    shared: Shared | None
    """The folders of the head that all nodes see, if there is no remote."""
    scratch: str | None
    """The URL below which checkpoints are kept; None for `scratch` on the remote, or `.scratch` in the shared folder."""
    versions: Mapping[str, str]
    """The versions of the head's packages, by name. If there is a requirements.lock, only the packages that it lists."""


@dataclass(frozen=True)
class Node:
    """Runs one stage on the node to which Ray sends it. `run` takes the same arguments as `dag.Processes.run` on the head."""

    study: Study
    upstream: str
    """The text of a `dvc.lock` with the entries of the stages whose outputs this stage reads."""
    design: str = ""
    """The text of a `design.yaml` that lists only this stage and those in `upstream`, because DVC would read all stages."""

    def run(
        self, stage: str, log: Callable[[str], None], environment: Mapping[str, str] | None = None, command: str = ""
    ) -> dag.Outcome:
        """Pull the inputs of the stage, bring it up to date, and push its outputs. Raises `dag.StageError`."""
        try:
            os.environ.pop(THREADS, None)
            check_versions(self.study.versions)
            with self._clone() as root:
                (root / "dvc.lock").unlink(missing_ok=True)
                if self.design:
                    (root / DESIGN).write_text(self.design)
                if self.upstream:
                    (root / "dvc.lock").write_text(self.upstream)
                pull(root, stage, self.study.remote)
                with self._scratch(stage, root, log) as scratch:
                    variables = {**(environment or {}), "DIT_SCRATCH": str(scratch)}
                    with dag.Processes(root, variables) as processes:
                        outcome = processes.run(stage, log)
                push(root, stage, self.study.remote)
                return outcome
        except dag.StageError as error:
            if error.exit_code == disk.EXIT_CODE and not error.transient:
                raise self._full_disk(stage) from None
            raise dag.StageError(stage, error.exit_code, error.transient, f"{error.reason}, on node {here()}") from None
        except UnreachableError as error:
            raise dag.StageError(stage, None, True, f"node {here()}: {error}") from None
        except (UserError, DvcException, OSError) as error:
            if disk.full_path(error) is not None:
                raise self._full_disk(stage) from None
            raise dag.StageError(stage, None, False, f"node {here()}: {error}") from None

    def _full_disk(self, stage: str) -> dag.StageError:
        """The error for a full disk. It names the disk with the least free space of all to which the stage writes."""
        work, remote, shared = work_folder(), self.study.remote, self.study.shared
        places = {work: f"by removing this folder while no study runs, or choose another disk there by {WORK}"}
        if remote and remote.folder:
            places[remote.folder] = "with `dvc gc --workspace --cloud`, which drops results of other parameters from the remote"
        if shared:
            places[Path(shared.cache)] = disk.ADVICE
        full = min(places, key=disk.free_bytes)
        return dag.StageError(stage, disk.EXIT_CODE, False, f"node {here()}: {disk.FullDiskError(full, places[full])}")

    def ran(self, stage: str, seconds: float) -> None:
        """Tell the head how long the stage took."""
        voices.took(stage, seconds)

    @contextmanager
    def _clone(self) -> Iterator[Path]:
        """A clone of the study that no other stage uses while the block runs; a new one if none is free."""
        work = work_folder()
        if self.study.shared:
            self.study.shared.check(self.study.commit)
        folder = work / STUDIES / self.study.commit
        folder.mkdir(parents=True, exist_ok=True)
        number = 0
        while True:
            name = f"{socket.gethostname()}-{number}"  # nodes may share `folder`, and flock may not work across hosts
            with (folder / f"{name}.lock").open("w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    number += 1
                    continue
                root = folder / name
                if not (root / ".git").exists() or not snapshot.is_clean(root, self.study.commit):
                    shutil.rmtree(root, ignore_errors=True)
                    self._make(root)
                self._configure(root, work)
                yield root
                return

    def _make(self, root: Path) -> None:
        bundle = root.with_name(f"{root.name}.bundle")
        try:
            bundle.write_bytes(self._bundle())
            snapshot.check_out(bundle, self.study.commit, root)
        finally:
            bundle.unlink(missing_ok=True)

    def _configure(self, root: Path, work: Path) -> None:
        """Write the clone's DVC settings, for each stage: studies of the same commit may use different remotes or keys."""
        local = root / ".dvc" / "config.local"
        local.unlink(missing_ok=True)
        local.touch(0o600)  # it may hold keys of the remote
        remote, shared = self.study.remote, self.study.shared
        with Config(str(root / ".dvc")).edit("local") as config:
            if remote:
                config["core"]["remote"] = remote.name
                config["remote"].update({name: dict(section) for name, section in remote.settings.items()})
            config["core"]["site_cache_dir"] = str(root / ".dvc" / "tmp" / "site")
            config["cache"]["dir"] = shared.cache if shared else str(work / "cache")
            config["cache"]["type"] = ["reflink", "hardlink", *(["symlink"] if shared else []), "copy"]

    def _bundle(self) -> bytes:
        name = f"{self.study.commit}.bundle"
        if self.study.remote:
            return self.study.remote.get(STUDIES, name)
        assert self.study.shared
        return Path(self.study.shared.root, FOLDER, name).read_bytes()

    @contextmanager
    def _scratch(self, stage: str, root: Path, log: Callable[[str], None]) -> Iterator[Path]:
        """The folder to which the stage writes checkpoints. They are kept, or copied to a place, where every node sees them."""
        study = self.study
        if study.scratch is None and study.remote is None:
            assert study.shared
            yield Path(study.shared.root, ".scratch")
            return
        if study.scratch is not None:
            kept = Place.at(study.scratch)
        else:
            assert study.remote
            kept = Place(study.remote.filesystem, study.remote.path(SCRATCH))
        with Mirror(root.with_name(f"{root.name}.scratch"), kept.below(stage), log) as mirror:
            yield mirror.folder


def pull(root: Path, stage: str, remote: Remote | None) -> None:
    """Bring the outputs of other stages that `stage` reads into the clone at `root`."""
    with Repo(str(root), _wait_for_lock=True) as repo:
        wanted = next(each for each in repo.index.stages if getattr(each, "name", None) == stage)
        made = [out.fs_path for out in repo.index.outs]
        targets = [dep.fs_path for dep in wanted.deps if any(repo.fs.isin_or_eq(dep.fs_path, out) for out in made)]
        if not targets:
            return
        with remote.reached(f"pulling what stage '{stage}' reads") if remote else nullcontext():
            if remote:
                repo.fetch(targets, remote=remote.name)
            repo.checkout(targets, force=True)


def push(root: Path, stage: str, remote: Remote | None) -> None:
    """Push the outputs of `stage` to the remote, and then the entry of DVC's run cache by which the head finds them."""
    if remote is None:
        return
    with Repo(str(root), _wait_for_lock=True) as repo, remote.reached(f"pushing the outputs of stage '{stage}'"):
        done = next(each for each in repo.index.stages if getattr(each, "name", None) == stage)
        for objects in done.get_used_objs().values():
            failed = repo.cloud.push(objects, odb=remote.odb(repo.site_cache_dir)).failed
            if failed:
                raise UnreachableError(f"the DVC remote '{remote.name}' did not take {len(failed)} files of stage '{stage}'")
        key, entry = _get_stage_hash(done), to_single_stage_lockfile(done)
        value = _get_cache_hash(entry)
        remote.put_run_cache(key, value, Path(repo.stage_cache._get_cache_path(key, value)))


def work_folder() -> Path:
    """The folder in which this node keeps clones and its DVC cache."""
    return Path(os.environ.get(WORK) or DEFAULT_WORK).expanduser().absolute()


def installed() -> dict[str, str]:
    """Versions of all packages that are installed here, by name, without the suffix that tells builds apart, such as +cu126."""
    found: dict[str, str] = {}
    for package in distributions():  # if a name is found twice, Python imports the first
        found.setdefault(package.name.lower(), package.version.partition("+")[0])
    return found


def check_versions(wanted: Mapping[str, str]) -> None:
    """Raises `UserError` if a package has another version here than in `wanted`, or if torch or DVC is missing."""
    known = installed()
    wrong = [
        f"{name} {known[name]} instead of {wanted[name]}"
        for name in sorted(wanted)
        if known.get(name, wanted[name]) != wanted[name]
    ]
    wrong += [f"no {name}" for name in ("torch", "dvc") if name not in known]
    if wrong:
        more = f", and {len(wrong) - MOST_TOLD} more" if len(wrong) > MOST_TOLD else ""
        raise UserError(
            f"other packages than on the head: {', '.join(wrong[:MOST_TOLD])}{more}; install the study's requirements.lock "
            "there, and start the study again"
        )


def here() -> str:
    """The name and address of this node, for messages."""
    import ray

    return f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"
