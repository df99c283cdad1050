"""How every stage starts and ends: parameters checked first, outputs complete or absent, faults as exit codes.

Exit codes: 0 done; 2 the user's input is wrong, do not retry; 75 (EX_TEMPFAIL of sysexits.h) a fault of the machine that a
retry may cure; 1 a defect.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dit import yamlfile
from dit.config import Params, load
from dit.errors import ConfigError, InputError, UserError
from dit.init import Strategy
from pipelines.disk import FullDiskError, full_path
from pipelines.stages.launch import WRONG_INPUT, check_devices, in_group, join_group, run_group

TRANSIENT = os.EX_TEMPFAIL


def run_dvc_stage(stage: Callable[[Params], None], section: str = "") -> None:
    """Check the whole `params.yaml`, run `stage`, and exit with a code that says what went wrong, if anything did.

    A stage whose `section` of the parameters wants several processes runs as a group, in which each process comes here again.
    """
    try:
        params = load()
        settings = getattr(params, section) if section else None
        if in_group():
            join_group(section, settings)
        elif settings and settings.processes > 1:
            check_devices(section, settings)
            code = run_group(settings.processes)
            sys.exit(TRANSIENT if code < 0 else code)
        _run(stage, params)
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
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(WRONG_INPUT)
    except (OSError, torch.OutOfMemoryError) as error:
        traceback.print_exc()
        print(f"error: {error}; a retry may help", file=sys.stderr)
        sys.exit(TRANSIENT)


def _run(stage: Callable[[Params], None], params: Params) -> None:
    """Raises `FullDiskError` where the stage fails for that, whatever the library that wrote made of it."""
    try:
        stage(params)
    except Exception as error:
        if (path := full_path(error)) is not None:
            raise FullDiskError(path) from None
        raise


def check_strategy(params: Params, name: str) -> None:
    """Raises `ConfigError` where there is no strategy called `name`."""
    if name not in params.strategies:
        raise ConfigError(f"unknown strategy '{name}'; expected one of {', '.join(params.strategies)}")


def strategy_of(params: Params, name: str) -> Strategy:
    """The strategy called `name`, whose rules are those that DVC has tracked.

    Raises `ConfigError` where there is none, and `InputError` where stage `strategies` has not written the rules it has now.
    """
    check_strategy(params, name)
    path = Path(f"runs/strategies/{name}.json")
    if not path.is_file():
        raise InputError(path)
    if json.loads(path.read_text()) != params.strategies[name].resolved:
        raise InputError(path, f"holds other rules than strategy '{name}' has now")
    return params.strategies[name]


def run_key(stage: str, settings: object, strategy: str = "", seed: int = 0) -> str:
    """The identity of a run: a digest of its settings, and of the code and inputs that `dvc.yaml` declares for its stage.

    `settings` is the JSON-able slice of parameters that the run depends on, as well as the kind of device it runs on;
    `strategy` and `seed` are those of a stage that has them.
    """
    identity = [stage, strategy, seed, torch.__version__, settings]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode())
    for declared in _stages()[stage]["deps"]:
        path = Path(declared.replace("${item.strategy}", strategy).replace("${item.seed}", str(seed)))
        for file in _content(path):
            digest.update(f"\n{file.as_posix()}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def made_by(path: Path) -> str | None:
    """The stage that makes the file or folder at `path`, such as `train@adaln_zero-0`; None where `dvc.yaml` has none."""
    for name, stage in _stages().items():
        for out in map(Path, stage["outs"]):
            found = Path(*path.parts[: len(out.parts)])
            if found == out:
                return name
            if "matrix" in stage and found.parent == out.parent:
                return f"{name}@{found.name}"
    return None


def _stages() -> dict[str, Any]:
    stages: dict[str, Any] = yamlfile.read("dvc.yaml")["stages"]
    return stages


def _content(path: Path) -> list[Path]:
    """The files that determine a dependency; a store's manifest holds the checksums of all else in it."""
    if path.is_file():
        return [path]
    if (path / "manifest.json").exists():
        return [path / "manifest.json"]
    return sorted(file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
