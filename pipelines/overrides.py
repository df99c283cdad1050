"""Overrides of parameters as the user types them: `train.steps=300`."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from dit import yamlfile
from dit.errors import ConfigError, UserError

WORD = re.compile(r"[A-Za-z_][\w./-]*", re.ASCII)
"""Strings that need no quotes in YAML, except words such as `true` and `null`."""


def assignments(texts: Iterable[str]) -> dict[str, Any]:
    """The value of each key, read as YAML. Raises `UserError` for a text that is no assignment."""
    return dict(_assignment(text) for text in texts)


def _assignment(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set {text}: expected KEY=VALUE, such as train.steps=300, without spaces around =")
    try:
        return key, yamlfile.parse(value, f"--set {text}")
    except ConfigError as error:
        raise UserError(f'{error}; SET splits at spaces, so write a list as [0,1] and a mapping as {{"a":1}}') from None


def whole_number(name: str, text: str | None, most: int | None = None) -> int | None:
    """A whole number of at least 1, and at most `most`; None for no text. Raises `UserError` for anything else."""
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text) or not 0 < int(text) <= (most or int(text)):
        upper = f"from 1 to {most}" if most else "of at least 1"
        raise UserError(f"{name} = {text[:40]}: expected a whole number {upper}")
    return int(text)


def override(text: str, overrides: Mapping[str, Any], where: str = "overrides") -> str:
    """The `text` of a `params.yaml` with other values for dotted keys such as `train.steps`; comments stay.

    Raises `ConfigError`, which says `where` the overrides come from, for a key whose section does not exist.
    """
    written = layout()
    data = written.load(text)
    for key, value in overrides.items():
        *sections, last = key.split(".")
        section = data
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        if not isinstance(section, dict):
            raise ConfigError(f"{where}: {key} is not a known key; expected a dotted key of params.yaml, such as train.steps")
        section[last] = _as_written(value)
    stream = io.StringIO()
    written.dump(data, stream)
    return stream.getvalue()


def layout() -> YAML:
    """Reads and writes YAML in the layout of `params.yaml`."""
    made = YAML()
    made.width = 4096
    made.indent(mapping=2, sequence=4, offset=2)
    made.representer.add_representer(type(None), lambda writer, _: writer.represent_scalar("tag:yaml.org,2002:null", "null"))
    return made


def _as_written(value: Any) -> Any:
    """The value in the style of `params.yaml`: lists and mappings on one line, strings in quotes unless they need none."""
    if isinstance(value, dict):
        value = CommentedMap({key: _as_written(entry) for key, entry in value.items()})
    elif isinstance(value, list):
        value = CommentedSeq(map(_as_written, value))
    elif isinstance(value, str) and not (WORD.fullmatch(value) and yamlfile.parse(value, "") == value):
        return DoubleQuotedScalarString(value)
    else:
        return value
    value.fa.set_flow_style()
    return value
