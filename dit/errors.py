"""Errors that a user can act on. Anything else that is raised is a defect of this project."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

NAMED = 3
"""Of the entries that a message is about, how many it names."""


class UserError(Exception):
    """Something that the user gave is wrong. The message says what, where, and what would be accepted."""


class ConfigError(UserError):
    """A parameter is wrong: the message names the file, the key, the value and what is accepted."""


class DataError(UserError):
    """Input data is unusable: the message names the file or item, and what is wrong with it."""


def explain(error: ValidationError, where: str) -> str:
    """A pydantic error as one line for each wrong key: where, the key, its value, and what is accepted.

    What several entries of a mapping have in common, as strategies that share rules do, is told once.
    """
    problems = error.errors(include_url=False)
    alternatives: dict[str, list[str]] = {}
    locations: dict[str, tuple[int | str, ...]] = {}
    for problem in problems:
        location = problem["loc"]
        if any(_same_place(problem, other) for other in problems):
            location = location[:-1]  # the last part names a member of a union, not a key
        head, accepted = _told(problem, _key(location))
        alternatives.setdefault(head, []).append(accepted)
        locations[head] = location
    alike: dict[str, list[str]] = {}
    for head, choices in alternatives.items():
        start, rest = _key(locations[head][:2]), len(locations[head]) > 2
        line = f"{head}{' or '.join(choices)}"
        alike.setdefault(line.removeprefix(start) if rest else line, []).append(start if rest else "")
    return "\n".join(f"{where}: {starts[0]}{line}{_also(starts[1:])}" for line, starts in alike.items())


def _also(others: list[str]) -> str:
    """The end of a line that is true of `others` as well."""
    named = ", ".join(other.rpartition(".")[2] for other in others[:NAMED])
    more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
    return f" (the same in {named}{more})" if others else ""


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
    if problem["type"] == "union_tag_not_found":
        return f"{key}.{_tag(problem)} is missing", ""
    if problem["type"] == "union_tag_invalid":
        return f"{key}.{_tag(problem)} = {problem['ctx']['tag']!r}; accepted: ", problem["ctx"]["expected_tags"]
    if problem["type"] == "value_error":
        return f"{key + ': ' if key else ''}{problem['ctx']['error']}", ""
    return f"{key} = {problem['input']!r}; accepted: ", problem["msg"].removeprefix("Input should be ")


def _key(location: tuple[int | str, ...]) -> str:
    """`("strategies", "x", "rules", 2, "normal", "std")` -> `strategies.x.rules[2].normal.std`."""
    key = ""
    for part in location:
        key += f"[{part}]" if isinstance(part, int) else f".{part}"
    return key.removeprefix(".")


def _tag(problem: Any) -> str:
    """The key by which the member of a union is chosen."""
    return str(problem["ctx"]["discriminator"]).strip("'")
