"""Other values of parameters as a person types them: `train.steps=300`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dit import yamlfile
from dit.errors import ConfigError, UserError


def assignments(texts: Iterable[str]) -> dict[str, Any]:
    """The value of each key, read as YAML. Raises `UserError` for what is no assignment."""
    return dict(_assignment(text) for text in texts)


def _assignment(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set {text}: expected KEY=VALUE, such as train.steps=300")
    try:
        return key, yamlfile.parse(value, f"--set {text}")
    except ConfigError as error:
        raise UserError(f"{error}; make's SET splits at spaces") from None
