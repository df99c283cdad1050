"""One finding of a check: what was checked, where it is named, what was found, and what is expected."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Severity = Literal["fine", "warning", "error"]
_NAMED = re.compile(r"[\w.]+(?:\[\d+\])?[\w.\[\]]* = .+?(?=: |; |, but |, where | with | holds | has |$)")
"""The beginning of most messages: a key and its value."""


@dataclass(frozen=True)
class Finding:
    """One row of the table. `where` is a key of params.yaml with its value, or a file; `found` is what the check found."""

    what: str
    where: str
    found: str
    expected: str = ""
    severity: Severity = "fine"

    @property
    def key(self) -> str:
        """The key of the parameters, or the file, that `where` names."""
        return self.where.partition(" = ")[0]

    def __str__(self) -> str:
        """The finding as one sentence."""
        return f"{self.where}: {self.found}{f'; expected {self.expected}' if self.expected else ''}"


def of_error(what: str, where: str, error: BaseException, severity: Severity = "error") -> Finding:
    """The finding in an error's message; `where` gives the key and value if the message does not begin with them."""
    head, _, expected = " ".join(str(error).split()).partition("expected ")
    if named := _NAMED.match(head):
        key = named[0].partition(" = ")[0]
        if not where.partition(" = ")[0].endswith(f".{key}"):  # otherwise `where` says which of several keys of this name
            where = named[0]
        head = head[named.end() :]
    found = head.strip(" :;,").removeprefix("but ")
    return Finding(what, where.rstrip(" :;,"), found or "does not fit", expected, severity)
