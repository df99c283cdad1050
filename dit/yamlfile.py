"""The one reader and writer of YAML: version 1.2, as DVC reads it, without what a file of values does not need.

So `010` is ten, `yes` and `1:30` are words, and `1e-3` is a number, in every file and for every tool. Tags, such as `!!int`,
are refused; so is a file that is larger, deeper, or by its aliases longer than any that a person writes.
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
"""In one file, where an alias counts as what it stands for."""
DEEPEST = 64


def read(path: str | Path, where: str | Path | None = None) -> Any:
    """What a YAML file holds; messages call it `where`.

    Raises `FileNotFoundError`, and `ConfigError` where it is no file that can be read, no YAML, or has a key twice.
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
    """What YAML text holds. Raises `ConfigError`, which names `where` it stands and the line, where it is not YAML."""
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
    """Raise `MarkedYAMLError` for tags, depth, a value that holds itself, and too many values."""
    opened: list[tuple[str | None, int]] = []  # anchor of each collection around here, and the values before it
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
    """YAML text that holds `value`, with keys in their order."""
    layout = YAML(typ="safe")
    layout.default_flow_style = False
    layout.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    stream = io.StringIO()
    layout.dump(value, stream)
    return stream.getvalue()
