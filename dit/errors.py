"""Errors that a user can act on. Anything else that is raised is a defect of this project."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError


class UserError(Exception):
    """Something that the user gave is wrong. The message says what, where, and what would be accepted."""


class ConfigError(UserError):
    """A parameter is wrong: the message names the file, the key, the value and what is accepted."""


class DataError(UserError):
    """Input data is unusable: the message names the file or item, and what is wrong with it."""


def explain(error: ValidationError, where: str) -> str:
    """A pydantic error as one line for each wrong key: where, the key, its value, and what is accepted."""
    problems = error.errors(include_url=False)
    alternatives: dict[str, list[str]] = {}
    for problem in problems:
        location = problem["loc"]
        if any(_same_place(problem, other) for other in problems):
            location = location[:-1]  # the last part names a member of a union, not a key
        head, accepted = _told(problem, _key(location))
        alternatives.setdefault(head, []).append(accepted)
    return "\n".join(f"{where}: {head}{' or '.join(accepted)}" for head, accepted in alternatives.items())


def _same_place(problem: Any, other: Any) -> bool:
    """Whether two problems are about one value that fits no member of a union."""
    told = ("missing", "extra_forbidden", "value_error")
    return (
        problem["type"] not in told
        and other["type"] not in told
        and problem["loc"] != other["loc"]
        and problem["loc"][:-1] == other["loc"][:-1]
        and problem["input"] is other["input"]
        and not isinstance(problem["loc"][-1], int)
    )


def _told(problem: Any, key: str) -> tuple[str, str]:
    if problem["type"] == "missing":
        return f"{key} is missing", ""
    if problem["type"] == "extra_forbidden":
        return f"{key} is not a known key (value {problem['input']!r})", ""
    if problem["type"] == "value_error":
        return f"{key + ': ' if key else ''}{problem['ctx']['error']}", ""
    return f"{key} = {_shown(problem)}; accepted: ", problem["msg"].removeprefix("Input should be ")


def _key(location: tuple[int | str, ...]) -> str:
    """`("strategies", "x", "rules", 2, "normal", "std")` -> `strategies.x.rules[2].normal.std`."""
    key = ""
    for part in location:
        key += f"[{part}]" if isinstance(part, int) else f".{part}"
    return key.removeprefix(".")


def _shown(problem: Any) -> str:
    if problem["type"] == "union_tag_invalid":
        return repr(problem["ctx"]["tag"])
    return repr(problem["input"])
