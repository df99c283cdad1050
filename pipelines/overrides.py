"""Other values of parameters as a person types them: `train.steps=300`."""

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
"""Most of these need no quotes; `true` and `null` do."""


def assignments(texts: Iterable[str]) -> dict[str, Any]:
    """The value of each key, read as YAML. Raises `UserError` for what is no assignment."""
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
    """A number from 1 on; None where nothing was given. Raises `UserError` for anything else."""
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text) or not 0 < int(text) <= (most or int(text)):
        upper = f"from 1 to {most}" if most else "of at least 1"
        raise UserError(f"{name} = {text[:40]}: expected a whole number {upper}")
    return int(text)


def override(text: str, overrides: Mapping[str, Any], where: str = "overrides") -> str:
    """`text` of a `params.yaml` with dotted keys such as `train.steps` set to other values; comments stay.

    Raises `ConfigError`, which names `where` they come from, for a key whose section is not there.
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
    """Lists and mappings on one line, as `params.yaml` has them; strings in quotes, but for words that stand for themselves."""
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
