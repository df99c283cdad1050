"""Other values of parameters as a person types them: `train.steps=300`."""

from __future__ import annotations

import re
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


def whole_number(name: str, text: str | None, most: int | None = None) -> int | None:
    """A number from 1 on; None where nothing was given. Raises `UserError` for anything else."""
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text) or not 0 < int(text) <= (most or int(text)):
        upper = f"from 1 to {most}" if most else "of at least 1"
        raise UserError(f"{name} = {text[:40]}: expected a whole number {upper}")
    return int(text)
