"""The only reader and writer of YAML: version 1.2, as DVC reads it, without the features that parameter files do not need.

So `010` is ten, `yes` and `1:30` are strings, and `1e-3` is a number, in every file and for every tool. Tags, such as `!!int`,
are refused. A file is also refused if it is larger, more deeply nested, or longer (with its aliases expanded) than a person
would write it.
"""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, NodeEvent

from dit.errors import ConfigError

MOST_BYTES = 1 << 20
MOST_VALUES = 20_000
"""Most values in one file; an alias counts as many as the value that it stands for."""
DEEPEST = 64


def read(path: str | Path, where: str | Path | None = None) -> Any:
    """The content of a YAML file; messages call the file `where`.

    Raises `FileNotFoundError`, and `ConfigError` if the file cannot be read, is not valid YAML, or has a key twice.
    """
    where = path if where is None else where
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{where}: not a file")
        if status.st_size > MOST_BYTES:
            raise ConfigError(f"{where}: {status.st_size} bytes, but at most {MOST_BYTES} are read; is it the right file?")
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: not valid YAML: byte {error.start} is not UTF-8; save the file in UTF-8") from None
    return parse(text, where)


def parse(text: str, where: str | Path) -> Any:
    """The content of YAML text. If the text is not valid YAML, raises `ConfigError` that names `where` and the line."""
    try:
        _check(text)
        return YAML(typ="safe").load(text)
    except MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        problem = error.problem or error.context or "it cannot be read"
    except (YAMLError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        line, problem = "", str(error) or "it cannot be read"
    raise ConfigError(f"{where}: not valid YAML: {line}{problem.splitlines()[0]}")


def _check(text: str) -> None:
    """Raise `MarkedYAMLError` for tags, unknown aliases, a value that contains itself, deep nesting, and too many values."""
    opened: list[tuple[str | None, int]] = []  # of each open collection: its anchor, and the number of values before it
    lengths: dict[str, int] = {}
    count = 0
    for event in YAML(typ="safe").parse(text):
        if isinstance(event, AliasEvent):
            if event.anchor not in lengths:
                problem = "holds itself" if event.anchor in [name for name, _ in opened] else "is not known"
                raise _problem(f"*{event.anchor} {problem}", event)
            count += lengths[event.anchor]
        elif isinstance(event, CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor:
                lengths[anchor] = count - before
        elif isinstance(event, NodeEvent):
            if tag := getattr(event, "tag", None):
                tag = str(tag).replace("tag:yaml.org,2002:", "!!")
                raise _problem(f"the tag {tag} is not read here; write the value without it", event)
            count += 1
            if isinstance(event, CollectionStartEvent):
                opened.append((event.anchor, count - 1))
                if len(opened) > DEEPEST:
                    raise _problem(f"values lie inside each other more than {DEEPEST} deep", event)
            elif event.anchor:
                lengths[event.anchor] = 1
        if count > MOST_VALUES:
            raise _problem(f"more than {MOST_VALUES} values, counting an alias as what it stands for", event)


def _problem(text: str, event: Any) -> MarkedYAMLError:
    return MarkedYAMLError(problem=text, problem_mark=event.start_mark)


def dump(value: Any) -> str:
    """`value` as YAML text, with keys in their order."""
    layout = YAML(typ="safe")
    layout.default_flow_style = False
    layout.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    stream = io.StringIO()
    layout.dump(value, stream)
    return stream.getvalue()
