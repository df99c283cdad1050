"""The only writer of CSV: rows are mappings, None becomes an empty field, and lines end in a line feed on every machine."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def write(path: Path, header: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write `rows` under `header`, which contains all keys of the rows."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, header, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
