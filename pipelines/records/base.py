"""Records and tables: how one is written, read and checked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from dit import checksums, csvfile
from dit.errors import DataError, InputError, explain
from pipelines.files import write_json

if TYPE_CHECKING:
    import pandas as pd

Status = Literal["finished", "diverged", "collapsed"]
Settings = dict[str, Any]
"""A section of the parameters with which a run was made."""


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Finite = Annotated[float | None, BeforeValidator(_finite)]
"""A number in JSON; None stands for a number that is not finite."""


class Entry(BaseModel):
    """Base of all that is written as JSON; made from keywords, from JSON, or from an object with the same attributes."""

    model_config = ConfigDict(frozen=True, from_attributes=True)


class Record(Entry):
    """A JSON file."""

    FILE: ClassVar[str]

    def write(self, directory: Path) -> None:
        """Write the file into a directory, which is created if it is missing."""
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / self.FILE, self.model_dump(mode="json"))

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read the file.

        Raises `InputError` if the file is missing or damaged, and `DataError`, which names each wrong key.
        """
        path = directory / cls.FILE
        checksums.verify(path)
        try:
            data = json.loads(path.read_text())
        except FileNotFoundError:
            raise InputError(path) from None
        except ValueError as error:
            raise DataError(f"{path}: not valid JSON: {error}") from None
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise DataError(explain(error, str(path), data)) from None


class Timing(Record):
    """How long a run took and on which machine. Kept in the run's scratch folder, never in an output."""

    FILE = "timing.json"

    seconds: float
    images_per_second: float
    hostname: str


@dataclass(frozen=True)
class Table:
    """A CSV file of a run; `columns` are the columns that every run writes; a run may write more."""

    file: str
    columns: tuple[str, ...]

    def write(self, directory: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the file; None becomes an empty field."""
        header = tuple(rows[0]) if rows else self.columns
        csvfile.write(directory / self.file, header, rows)

    def write_frame(self, directory: Path, frame: pd.DataFrame) -> None:
        """Write the file; None and NaN become empty fields, and a column of integers with such gaps becomes floats."""
        frame.to_csv(directory / self.file, index=False, lineterminator="\n")

    def read(self, directory: Path) -> pd.DataFrame:
        """Read the file; values that are not finite become NaN.

        Raises `InputError` if the file is missing or damaged, and `DataError` if it lacks a column.
        """
        import pandas as pd

        path = directory / self.file
        checksums.verify(path)
        try:
            table = pd.read_csv(path).replace([float("inf"), float("-inf")], float("nan"))
        except FileNotFoundError:
            raise InputError(path) from None
        except pd.errors.EmptyDataError:  # a run that diverged at once, written by a version that left out the header
            return pd.DataFrame(columns=list(self.columns))
        except ValueError as error:
            raise DataError(f"{path}: not a table: {error}") from None
        if missing := [column for column in self.columns if column not in table]:
            raise DataError(f"{path} has no column {', '.join(missing)}; it has {', '.join(table.columns)}")
        return table
