"""JSON schema for the form of a Prefect deployment, from this folder's parameters, profiles and strategies.

The server checks every flow run against it before anything starts, also runs that `prefect deployment run` creates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from dit import config
from dit.config import Params
from dit.errors import UserError
from pipelines.experiments import PROFILES

Schema = dict[str, Any]
EXPECTED = "a dotted key of params.yaml, such as train.steps"
"""What the server's message says for an unknown key. As the schema's `const` it is a value that nobody gives."""
SIMPLE = ("integer", "number", "boolean", "string")


def overrides() -> Schema:
    """Any dotted key of `params.yaml`, with a value of its type; checks across several keys come later.

    Sections in which the user chooses the keys, such as `strategies`, are given as a whole.
    """
    known = {"properties": dict(_keys()), "additionalProperties": {"const": EXPECTED}}
    return {"type": "object", "if": True, "then": known}  # as `properties`, each key would be a field of the form


def profiles() -> Schema:
    """The name of one profile of this folder."""
    return _one_of(file.stem for file in sorted(PROFILES.glob("*.yaml")))


def strategies() -> Schema:
    """Any of the strategies that this folder knows."""
    try:
        names = list(config.load(Path("params.yaml")).strategies)
    except UserError:
        names = []
    return {"type": "array", "items": _one_of(names), "uniqueItems": True}


def _one_of(names: Any) -> Schema:
    chosen = list(names)
    return {"type": "string", "enum": chosen} if chosen else {"type": "string"}


@cache
def _parameters() -> Schema:
    return Params.model_json_schema()


def _keys() -> Iterator[tuple[str, Schema]]:
    """Every dotted key that any kind of a section has, with its schema if the schema is simple."""
    found: dict[str, Schema] = {}
    for name, schema in _parameters()["properties"].items():
        _walk(name, schema, found)
    yield from found.items()


def _walk(name: str, schema: Mapping[str, Any], found: dict[str, Schema]) -> None:
    kinds = list(_kinds(schema))
    simple = len(kinds) == 1 and kinds[0].get("type") in SIMPLE and "$ref" not in kinds[0]
    found[name] = dict(kinds[0]) if simple and name not in found else {}
    for kind in kinds:
        for key, inner in kind.get("properties", {}).items():
            _walk(f"{name}.{key}", inner, found)


def _kinds(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The alternative schemas. A value must match one of them."""
    if "$ref" in schema:
        yield from _kinds(_parameters()["$defs"][schema["$ref"].rpartition("/")[2]])
    elif alternatives := schema.get("oneOf") or schema.get("anyOf"):
        for alternative in alternatives:
            yield from _kinds(alternative)
    else:
        yield schema
