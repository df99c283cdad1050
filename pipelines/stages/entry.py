"""How every stage starts and ends: parameters are checked first, and exit codes tell what went wrong.

Exit codes: 0 done; 2 the user's input is wrong, do not retry; 75 (EX_TEMPFAIL of sysexits.h) a fault of the machine that a
retry may cure; 1 a defect.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer

from dit.config import Params, load
from dit.errors import InputError, UserError
from pipelines import design, named_files
from pipelines.design import Item
from pipelines.disk import FullDiskError, full_path
from pipelines.stages.launch import WRONG_INPUT, check_devices, in_group, join_group, run_group

TRANSIENT = os.EX_TEMPFAIL


Stage = Callable[[Params, Item], None]
"""The function of a stage; it gets the parameters of the stage's setting, and the stage's entry in the study."""


def run_dvc_stage(stage: Stage, name: str, section: str = "") -> None:
    """Run `stage` from the command line: `python -m pipelines.stages.<name> KEY`; the default key means all runs.

    If the `section` of the parameters asks for several processes, the stage runs as a group, and each process of it calls this
    function again.
    """

    def main(
        key: Annotated[str, typer.Argument(help="Which stage of this name, as in design.yaml.")] = design.ALL,
    ) -> None:
        with exit_codes():
            params = load()
            item = design.item_named(params, name, key)
            params = params.with_values(item.setting.levels)
            named_files.link_from_home(params, Path.cwd())
            settings = getattr(params, section) if section else None
            if in_group():
                join_group(section, settings)
            elif settings and settings.processes > 1:
                check_devices(section, settings)
                code = run_group(settings.processes)
                sys.exit(TRANSIENT if code < 0 else code)
            design.checked_identity(params, item)
            stage(params, item)

    main.__doc__ = stage.__doc__
    typer.run(main)


@contextmanager
def exit_codes() -> Iterator[None]:
    """End the process with the exit code for what went wrong, if anything did."""
    try:
        with _full_disk_told():
            yield
    except FullDiskError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(TRANSIENT)
    except InputError as error:
        stage_name = made_by(error.path)
        print(f"error: {error}{f'; run `dvc repro {stage_name}`' if stage_name else ''}", file=sys.stderr)
        sys.exit(WRONG_INPUT)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(WRONG_INPUT)
    except PermissionError as error:
        print(
            f"error: no permission to use {error.filename or error}; change its owner or mode, and run again", file=sys.stderr
        )
        sys.exit(WRONG_INPUT)
    except (FileNotFoundError, NotADirectoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(WRONG_INPUT)
    except (OSError, torch.OutOfMemoryError) as error:
        traceback.print_exc()
        print(f"error: {error}; a retry may help", file=sys.stderr)
        sys.exit(TRANSIENT)


@contextmanager
def _full_disk_told() -> Iterator[None]:
    """Raises `FullDiskError` in place of any error that a full disk caused."""
    try:
        yield
    except Exception as error:
        if (path := full_path(error)) is not None:
            raise FullDiskError(path) from None
        raise


def run_key(item: Item, settings: object) -> str:
    """The identity of a run: a digest of its settings, its code, and its inputs.

    `settings` holds the parameters that the run depends on and the kind of device that it runs on, in a form that JSON accepts.
    """
    identity = [item.stage, item.strategy, item.seed, torch.__version__, settings, design.code_digest(item.stage)]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode())
    for path in map(Path, item.inputs.values()):
        for file in _content(path):
            digest.update(f"\n{file.as_posix()}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def made_by(path: Path) -> str | None:
    """The stage that makes the file or folder at `path`, such as `train@adaln_zero-0`; None if no stage does."""
    if path.is_relative_to(design.OUT):
        return "design"
    for stage, by_key in design.items(load()).items():
        for key, item in by_key.items():
            if item.out and path.is_relative_to(item.out):
                return stage if key == design.ALL else f"{stage}@{key}"
    return None


def _content(path: Path) -> list[Path]:
    """The files that determine an input; a store's manifest holds the checksums of all its other files."""
    if path.is_file():
        return [path]
    if (path / "manifest.json").exists():
        return [path / "manifest.json"]
    return sorted(file for file in path.rglob("*") if file.is_file())
