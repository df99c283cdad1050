"""The study's files as they are now, with uncommitted changes, as one git commit that a node can check out.

The commit has no parents, and always the same author and date, so its id depends only on the files.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from dit.errors import UserError

WHO = {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "dit study"), ("EMAIL", "study@localhost"), ("DATE", "2000-01-01T00:00:00+0000"))
}
OWN = (".gitignore", "dvc.lock", "design.yaml")
"""Files of a clone that DVC and the node change for each stage."""
REF = "refs/dit/snapshots/"


def take(root: Path) -> tuple[str, bytes]:
    """Commit all files of `root` that git does not ignore; return the commit's id, and a git bundle that holds the commit.

    Neither the index nor a branch of the repository changes. Raises `UserError` if `root` is not a git repository.
    """
    with TemporaryDirectory() as name:
        index, bundle = Path(name, "index"), Path(name, "bundle")
        own = Path(root, git(root, "rev-parse", "--git-path", "index").strip())
        if own.exists():  # with a copy of it, git need not read unchanged files again
            shutil.copy2(own, index)
        variables = {"GIT_INDEX_FILE": str(index), **WHO}
        git(root, "add", "--all", variables=variables)
        tree = git(root, "write-tree", variables=variables).strip()
        commit = git(root, "commit-tree", "-m", "The study as it stands", tree, variables=variables).strip()
        git(root, "update-ref", REF + commit, commit)
        try:
            git(root, "bundle", "create", "--quiet", str(bundle), REF + commit)
        finally:
            git(root, "update-ref", "-d", REF + commit)
        return commit, bundle.read_bytes()


def check_out(bundle: Path, commit: str, target: Path) -> None:
    """Make a repository with the files of `commit` at `target`, which must not exist yet. It appears complete, by a rename."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    git(partial, "init", "--quiet")
    git(partial, "fetch", "--quiet", str(bundle), f"{REF}{commit}")
    git(partial, "checkout", "--quiet", "--detach", commit)
    partial.rename(target)


def is_clean(root: Path, commit: str) -> bool:
    """Whether `root` holds the files of `commit` unchanged, apart from the files in `OWN`."""
    changed = git(
        root, "status", "--porcelain", "--untracked-files=no", "--", ".", *(f":(exclude,glob)**/{name}" for name in OWN)
    )
    return git(root, "rev-parse", "HEAD").strip() == commit and not changed


def git(root: Path, *arguments: str, variables: Mapping[str, str] | None = None) -> str:
    """Run git in `root` and return what it printed. Raises `UserError` with git's message if git fails."""
    command = ["git", *arguments]
    environment = {**os.environ, **(variables or {})}
    try:
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError("git not found: the cluster needs it on the head and on every node") from None
    if done.returncode:
        raise UserError(f"git {arguments[0]} failed in {root}: {done.stderr.strip()}")
    return done.stdout
