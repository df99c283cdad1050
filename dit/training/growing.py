"""Tables of a run that grow on disk while it trains, so that a user can watch the run."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from dit.training.records import Records

WATCHED = ("metrics", "validation")
"""The tables that grow on disk. Both have values by step from the first steps on, which a user can plot."""


class GrowingTables:
    """Copies of the tables in `WATCHED`, as `directory/NAME.csv`. The first `update` replaces old files; later ones append."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._written = dict.fromkeys(WATCHED, 0)

    def update(self, records: Records) -> None:
        """Append the rows that were recorded since the last update; each write consists of whole lines."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for name in WATCHED:
            rows = getattr(records, name)
            first = self._written[name]
            if len(rows) == first:
                continue
            lines = io.StringIO()
            writer = csv.DictWriter(lines, tuple(rows[0]), lineterminator="\n")
            if not first:
                writer.writeheader()
            writer.writerows(rows[first:])
            with (self.directory / f"{name}.csv").open("a" if first else "w") as file:
                file.write(lines.getvalue())
            self._written[name] = len(rows)

    def remove(self) -> None:
        """Remove the files. Call it when the run has ended and its complete tables are written elsewhere."""
        for name in WATCHED:
            (self.directory / f"{name}.csv").unlink(missing_ok=True)
