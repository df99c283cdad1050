"""Records which module of this project imports which, in every Python whose `IMPORTS_FOLDER` names a folder for that.

Python imports a module of this name at its start, if it finds one.
"""

from __future__ import annotations

import atexit
import builtins
import importlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def record(folder: Path) -> None:
    """Write `[arguments, [[importer, imported], ...], {module: file}]` at the end of this process."""
    edges: set[tuple[str, str]] = set()
    statement, function = builtins.__import__, importlib.import_module

    def note(importer: str, *names: str) -> None:
        edges.update((importer, name) for name in names if name.partition(".")[0] in ("dit", "pipelines"))

    def by_statement(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> ModuleType:
        module = statement(name, globals, locals, fromlist, level)
        note((globals or {}).get("__name__", ""), name, *(f"{name}.{each}" for each in fromlist or ()))
        return module

    def by_function(name: str, package: str | None = None) -> ModuleType:
        note(sys._getframe(1).f_globals["__name__"], name)
        return function(name, package)

    def report() -> None:
        files = {name: module.__file__ for name, module in list(sys.modules.items()) if getattr(module, "__file__", None)}
        own = {name: file for name, file in files.items() if name.partition(".")[0] in ("dit", "pipelines")}
        (folder / f"{os.getpid()}.json").write_text(json.dumps([sys.orig_argv, sorted(edges), own]))

    def forget_main() -> None:
        edges.difference_update({edge for edge in edges if edge[0] == "__main__"})

    builtins.__import__, importlib.import_module = by_statement, by_function
    os.register_at_fork(after_in_child=forget_main)  # a warm stage is not the server that it was forked from
    atexit.register(report)


if "IMPORTS_FOLDER" in os.environ:
    record(Path(os.environ["IMPORTS_FOLDER"]))
