"""The code that a stage runs, as `imports/sitecustomize.py` recorded it, and the code that `pipelines/code.yaml` declares."""

from __future__ import annotations

import ast
import json
from collections import defaultdict
from pathlib import Path

from dit import yamlfile
from pipelines import design

STAGES = "pipelines.stages."
WITHOUT_VALUES = {
    "dit",
    *("dit.config", "dit.design", "dit.sections", "dit.sections.data", "dit.sections.optim", "dit.sections.types"),
    "dit.yamlfile",
    *("dit.errors", "dit.terminal", "dit.progress", "dit.checksums"),
    "dit.csvfile",
    *("pipelines.design", "pipelines.files", "pipelines.stages.entry", "pipelines.stages.launch"),
}
"""Modules that are no dependencies, as `pipelines/code.yaml` says; nor is what a stage imports through them alone."""


def imported(recorded: Path, root: Path) -> dict[str, set[str]]:
    """By stage, the files of the project at `root` that its runs imported, those with values."""
    found: dict[str, set[str]] = defaultdict(set)
    for record in recorded.glob("*.json"):
        arguments, edges, files = json.loads(record.read_text())
        own = next((argument for argument in arguments if argument.startswith(STAGES)), None)
        if own:
            loaded = {**files, own: str(root / own.replace(".", "/")) + ".py"}
            reached = _reached(own, {(own if above == "__main__" else above, below) for above, below in edges})
            paths = {Path(loaded[module]) for module in reached & loaded.keys()}
            found[own.removeprefix(STAGES)] |= {path.relative_to(root).as_posix() for path in paths if _has_values(path)}
    return found


def _reached(module: str, edges: set[tuple[str, str]]) -> set[str]:
    """The modules that `module` imports, they import, and so on; importing one imports the packages around it."""
    below: dict[str, set[str]] = defaultdict(set)
    for importer, name in edges:
        below[importer].add(name)
    reached: set[str] = set()
    waiting = {module}
    while waiting:
        name = waiting.pop()
        if name not in reached | WITHOUT_VALUES:
            reached.add(name)
            waiting |= below[name] | ({name.rpartition(".")[0]} - {""})
    return reached


def _has_values(path: Path) -> bool:
    """Whether a file is more than the `__init__.py` of a package that only describes it."""
    if path.name != "__init__.py":
        return True
    return not all(isinstance(statement, (ast.Expr, ast.Import)) for statement in ast.parse(path.read_text()).body)


def declared(root: Path) -> dict[str, set[str]]:
    """By stage, the Python files and folders that are declared as its code."""
    return {stage: set(paths) for stage, paths in yamlfile.read(root / design.CODE).items()}
