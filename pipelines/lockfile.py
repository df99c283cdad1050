"""`dvc.lock` as the texts of its entries, so that one entry can be added without parsing thousands of others.

DVC parses and writes the whole file for each stage. Here DVC formats only one entry, and the file is put together from the
texts of all entries in the order of `dvc.yaml`. It has the same bytes as if DVC had written it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dvc.utils.serialize import dumps_yaml, parse_yaml

from pipelines.atomic_dvc import HEADER, entries, entry_text, replacing


class LockFile:
    """The entries of a `dvc.lock` by stage; `order` lists the stages as in `dvc.yaml`. Only `write` changes the file."""

    def __init__(self, path: Path, order: Sequence[str] = ()) -> None:
        self.path = path
        self._place = {name: index for index, name in enumerate(order)}
        self._texts, self._rest = _read(path)
        self.written = list(self._texts) == self._names()
        """Whether the file already has all entries, in the order of `dvc.yaml`."""

    def take(self, stage: str) -> None:
        """Read the entry of a stage from the file again, because another process may have written it."""
        texts, _ = _read(self.path)
        if stage in texts:
            self._texts[stage] = texts[stage]

    def __contains__(self, stage: str) -> bool:
        return stage in self._texts

    def text(self, stages: Sequence[str]) -> str:
        """The text of a `dvc.lock` with only the entries of `stages`; empty if none of them has an entry."""
        known = [self._texts[name] for name in stages if name in self._texts]
        return HEADER + "".join(known) if known else ""

    def add(self, stage: str, entry: Mapping[str, Any]) -> None:
        """Add the entry that DVC recorded for a stage."""
        self._texts[stage] = entry_text(stage, entry)
        self.written = False

    def write(self) -> None:
        """Replace the file, if it is not up to date, by a rename. Entries of stages that are not in `dvc.yaml` come last."""
        if not self.written:
            with replacing(self.path) as file:
                file.write(self.text(self._names()) + self._rest)
            self.written = True

    def _names(self) -> list[str]:
        return sorted(self._texts, key=lambda name: self._place.get(name, len(self._place)))


def _read(path: Path) -> tuple[dict[str, str], str]:
    """The lines of each stage's entry, and the text of the file's other keys. A file in another layout than DVC's is parsed."""
    text = path.read_text() if path.exists() else ""
    if found := entries(text):
        return found, ""
    data = parse_yaml(text, str(path))
    rest = {key: value for key, value in data.items() if key not in ("schema", "stages")}
    stages = data.get("stages", {}).items()
    return {name: entry_text(name, entry) for name, entry in stages}, dumps_yaml(rest) if rest else ""
