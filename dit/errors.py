"""Errors that a user can act on. Any other exception is a defect of this project."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from dit.terminal import plain

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

NAMED = 3
"""A message about several entries names at most this many of them."""


MOST_LINES, LONGEST_LINE = 40, 1000
"""Most lines of a message, and most letters of a line. The rest is left out; a long value that the user gave may cause it."""

NAME = r"^[A-Za-z0-9][A-Za-z0-9_]*$"
"""What the user may call a strategy."""

KEY = ".[key]"
"""The end of a location of pydantic that means the key of a mapping, not its value."""

Location = tuple[int | str, ...]


class UserError(Exception):
    """Something that the user gave is wrong. The message says what is wrong, where, and what is expected.

    `str(error)` is safe to print and has a limited length, whatever names or values it quotes.
    """

    def __str__(self) -> str:
        lines = super().__str__().splitlines()
        more = [f"... and {len(lines) - MOST_LINES} lines more"] if len(lines) > MOST_LINES else []
        return plain("\n".join([*(_shortened(line) for line in lines[:MOST_LINES]), *more]))


def _shortened(line: str) -> str:
    """The line; if it is longer than `LONGEST_LINE`, without its middle."""
    half = LONGEST_LINE // 2
    return line if len(line) <= LONGEST_LINE else f"{line[:half]} ... {line[-half:]}"


class ConfigError(UserError):
    """A parameter is wrong: the message names the file, the key, the value and what it should be."""


class DataError(UserError):
    """Input data is unusable: the message names the file or item, and what is wrong with it."""


class InputError(DataError):
    """A file or folder that an earlier step makes is missing, or was made with other parameters.

    The message says what is wrong with it. `path` is its path, from which a caller can find out which step makes it.
    """

    def __init__(self, path: str | Path, problem: str = "not found") -> None:
        super().__init__(f"{path} {problem}")
        self.path = Path(path)


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: "; did you mean train.steps?", or "" if no known name is similar."""
    near = get_close_matches(given, sorted(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def explain(error: ValidationError, where: str, data: Any, model: type[BaseModel] | None = None) -> str:
    """A pydantic error about `data` as one line for each wrong key: where, the key, its value, and what it should be.

    If several entries of one mapping have the same fault, such as strategies that share rules, one line reports it for all of
    them. The line of an unknown key suggests the most similar key of `model`.
    """
    choices: dict[str, list[str]] = {}
    locations: dict[str, Location] = {}
    for problem in error.errors(include_url=False):
        location = _written(problem, data)
        head, expected = _sentence(problem, _key(location))
        if model is not None and problem["type"] == "extra_forbidden":
            head += _hint(location, _fields(model, location))
        choices.setdefault(head, []).append(expected)
        locations[head] = location
    alike: dict[tuple[Location, str], list[str]] = {}
    for head, expected_ones in choices.items():
        location = locations[head] if len(locations[head]) > 2 else ()
        start = _key(location[:2])
        line = f"{head}{' or '.join(expected_ones)}".removeprefix(start)
        alike.setdefault((location[:1], line), []).append(start)
    return "\n".join(f"{where}: {starts[0]}{line}{_also(starts[1:])}" for (_, line), starts in alike.items())


def _hint(location: Location, beside: set[str]) -> str:
    """What the user may have meant by an unknown key; `beside` are the keys that any kind of this entry may have."""
    if location[-1] in beside:
        return f"; only another kind of {_key(location[:-1])} has it"
    return did_you_mean(_key(location), (_key((*location[:-1], name)) for name in beside))


def _also(others: list[str]) -> str:
    """The end of a line, which says that the line is also true for `others`."""
    named = ", ".join(other.rpartition(".")[2] for other in others[:NAMED])
    more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
    return f" (the same in {named}{more})" if others else ""


def _fields(model: type[BaseModel], location: Location) -> set[str]:
    """The keys that `model` allows beside the last key of `location`."""
    found = {model}
    for part in location[:-1]:
        below = {
            inner
            for outer in found
            if part in outer.model_fields
            for inner in _models(outer.model_fields[str(part)].annotation)
        }
        found = below or found  # a number, or a name that the user chose
    return {name for each in found for name in each.model_fields}


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The pydantic models that a type contains, such as the members of a union."""
    from pydantic import BaseModel  # imported here, since it takes longer than all other imports for a command's help

    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def _written(problem: Any, data: Any) -> Location:
    """The location of a problem as keys of `data`, without the names of union members that pydantic inserts."""
    keys: list[int | str] = []
    for part in problem["loc"][:-1]:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            if isinstance(part, str):
                continue
            data = ...  # an item of a list that a validator joined from several lists of `data`
        keys.append(part)
    of_value = data is problem["input"] and problem["type"] not in {"missing", "extra_forbidden"}
    return tuple(keys) if of_value else (*keys, *problem["loc"][-1:])


def _sentence(problem: Any, key: str) -> tuple[str, str]:
    if problem["type"] == "missing":
        return f"{key} is missing", ""
    if problem["type"] == "extra_forbidden":
        return f"{key} is not a known key (value {problem['input']!r})", ""
    if problem["type"] == "union_tag_not_found":
        return f"{key}.{_tag(problem)} is missing", ""
    if problem["type"] == "union_tag_invalid":
        chosen = problem["input"][_tag(problem)]
        return f"{key}.{_tag(problem)} = {chosen!r}; it should be one of ", problem["ctx"]["expected_tags"]
    if problem["type"] == "value_error":
        return f"{key + ': ' if key else ''}{problem['ctx']['error']}", ""
    value = "null" if problem["input"] is None else repr(problem["input"])
    wrong = f"{key.removesuffix(KEY)}: the name is wrong" if key.endswith(KEY) else f"{key} = {value}"
    return f"{wrong}; it should be ", _expected(problem)


def _expected(problem: Any) -> str:
    """What pydantic expects, in the words of YAML, as the end of a sentence."""
    limits = problem.get("ctx", {})
    match problem["type"]:
        case "tuple_type":
            return "a valid list"
        case "path_type":
            return "a path"
        case "string_too_short":
            return "text that is not empty"
        case "too_short":
            return f"a list with at least {limits['min_length']} {'entry' if limits['min_length'] == 1 else 'entries'}"
        case "string_pattern_mismatch":
            words = "letters, digits and underscores" if limits["pattern"] == NAME else "text"
            return f"{words} (pattern {limits['pattern']})"
    return str(problem["msg"]).removeprefix("Input should be ")


def _key(location: Location) -> str:
    """`("strategies", "x", "rules", 2, "std")` -> `strategies.x.rules[2].std`."""
    key = ""
    for part in location:
        key += f"[{part}]" if isinstance(part, int) else f".{part}"
    return key.removeprefix(".")


def _tag(problem: Any) -> str:
    """The key that chooses the member of a union, such as `kind`."""
    return str(problem["ctx"]["discriminator"]).strip("'")
