"""`dvc.lock` as the text of its entries, so that one of thousands of stages can be added without parsing the others.

DVC parses and writes the whole file for each stage. Here DVC writes the text of one entry, and the file is put together from
those texts in the order of `dvc.yaml`: the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dvc.utils.serialize import dumps_yaml, parse_yaml

from pipelines.atomic_dvc import replacing

HEADER = "schema: '2.0'\nstages:\n"
_ENTRY = re.compile(r"^  (?=\S)", re.MULTILINE)
_FOREIGN = re.compile(r"^    (deps|outs):\n      - ", re.MULTILINE)
"""Lists as `params.yaml` has them, and DVC does not."""


class LockFile:
    """The entries of a `dvc.lock`, by stage; `order` is that of `dvc.yaml`. Nothing is written before `write`."""

    def __init__(self, path: Path, order: Sequence[str] = ()) -> None:
        self.path = path
        self._place = {name: index for index, name in enumerate(order)}
        self._texts = _entries(path)
        self._written = True

    def take(self, stage: str) -> None:
        """Know of a stage what the file says now, which another process may have written."""
        texts = _entries(self.path)
        if stage in texts:
            self._texts[stage] = texts[stage]

    def __contains__(self, stage: str) -> bool:
        return stage in self._texts

    def text(self, stages: Sequence[str]) -> str:
        """A `dvc.lock` with the entries of `stages` alone, as far as there are any."""
        known = [self._texts[name] for name in stages if name in self._texts]
        return HEADER + "".join(known) if known else ""

    def add(self, stage: str, entry: Mapping[str, Any]) -> None:
        """Put in what DVC recorded of a stage."""
        self._texts[stage] = entry_text(stage, entry)
        self._written = False

    def write(self) -> None:
        """Bring the file up to date, by a rename; stages that `dvc.yaml` does not have stay at its end."""
        if not self._written:
            names = sorted(self._texts, key=lambda name: self._place.get(name, len(self._place)))
            with replacing(self.path) as file:
                file.write(self.text(names))
            self._written = True


def entry_text(stage: str, entry: Mapping[str, Any]) -> str:
    """The lines of one entry, as DVC writes them."""
    return dumps_yaml({"stages": {stage: dict(entry)}}).removeprefix("stages:\n")


def _entries(path: Path) -> dict[str, str]:
    """The lines of each entry of a file. A file in another layout than DVC's is parsed."""
    text = path.read_text() if path.exists() else ""
    head, *entries = _ENTRY.split(text)
    if entries and (head != HEADER or _FOREIGN.search(text)):
        stages = parse_yaml(text, str(path))["stages"]
        return {name: entry_text(name, entry) for name, entry in stages.items()}
    return {entry.partition(":\n")[0].strip("'\""): f"  {entry}" for entry in entries}
