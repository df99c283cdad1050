"""The one reader and writer of YAML: version 1.2, as DVC reads it.

So `010` is ten, `yes` and `1:30` are words, and `1e-3` is a number, in every file and for every tool.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from dit.errors import ConfigError


def read(path: str | Path) -> Any:
    """What a YAML file holds. Raises `ConfigError` where it is not YAML or has a key twice, and `FileNotFoundError`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    return parse(text, path)


def parse(text: str, where: str | Path) -> Any:
    """What YAML text holds. Raises `ConfigError`, which names `where` it stands and the line, where it is not YAML."""
    try:
        return YAML(typ="safe").load(text)
    except MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(f"{where}: not valid YAML: {line}{error.problem}") from None
    except (YAMLError, ValueError) as error:  # a ValueError is of a date that no calendar has
        raise ConfigError(f"{where}: not valid YAML: {error}") from None


def dump(value: Any) -> str:
    """YAML text that holds `value`, with keys in their order."""
    layout = YAML(typ="safe")
    layout.default_flow_style = False
    layout.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    stream = io.StringIO()
    layout.dump(value, stream)
    return stream.getvalue()
