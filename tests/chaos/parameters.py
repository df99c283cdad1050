"""Parameter files that nobody would write, drawn by hypothesis: each must be read or refused in seconds, without a crash."""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from dvc.utils.serialize import parse_yaml
from hypothesis import HealthCheck, Phase, given, seed as seeded, settings, strategies as st
from ruamel.yaml import YAML
from studies import environment

from dit import config, yamlfile
from dit.errors import ConfigError

ROOT = Path(__file__).parents[2]
SHIPPED: dict[str, Any] = yamlfile.parse((ROOT / "params.yaml").read_text(), "params.yaml")
LEAVES = [(section, key) for section, values in SHIPPED.items() if isinstance(values, dict) for key in values]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**4000), 10**4000)
    | st.floats()
    | st.text(max_size=20)
    | st.dates()
    | st.binary(max_size=4)
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3))
LEAVES_AT_ANY_DEPTH: list[tuple[str | int, ...]] = []
"""The paths of all scalars in the shipped parameters."""


def _list_leaves(value: Any, path: tuple[str | int, ...] = ()) -> None:
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _list_leaves(inner, (*path, key))
    else:
        LEAVES_AT_ANY_DEPTH.append(path)


_list_leaves(SHIPPED)
SPELLINGS = [
    "010",
    "0o10",
    "0x10",
    "1:30",
    "1_000",
    "yes",
    "on",
    "~",
    "1.",
    ".5",
    "1e3",
    "1.0e+3",
    ".inf",
    "-.nan",
    "2020-01-01",
    "'1'",
    "-0",
    "1e400",
]
"""Scalars that parsers of YAML 1.1 and YAML 1.2 read differently, or that look like numbers."""
NEAR = st.integers(-2, 10) | st.sampled_from([64, 128, 1000, 2**31, 2**63]) | st.floats(0, 2) | st.booleans() | st.none()
CHANGES = st.lists(st.tuples(st.sampled_from(LEAVES), VALUES), min_size=1, max_size=3)
SYNTAX = st.text("[]{}&*!|>:-?, \n'\"a1%@#~.", max_size=60)
TEXTS = st.text(max_size=200) | SYNTAX
MOST_SECONDS, MOST_BYTES, MOST_LETTERS = 5.0, 10**9, 45_000
PLACE = "a-scalar-stands-here"
BY_COMMAND = 50
"""Every `BY_COMMAND`-th file is also given to `dit check` in a process of its own, whose time and memory are measured."""


def changed(changes: list[tuple[tuple[str, str], Any]]) -> dict[str, Any]:
    """The shipped parameters with these values changed."""
    data = {section: dict(values) if isinstance(values, dict) else values for section, values in SHIPPED.items()}
    for (section, key), value in changes:
        data[section][key] = value
    return data


@st.composite
def near_texts(draw: st.DrawFn) -> str:
    """The shipped parameters with one scalar replaced by a value of about the right kind, or by an oddly spelt scalar."""
    data = deepcopy(SHIPPED)
    *path, last = draw(st.sampled_from(LEAVES_AT_ANY_DEPTH))
    holder: Any = data
    for key in path:
        holder = holder[key]
    spelling = draw(st.none() | st.sampled_from(SPELLINGS))
    holder[last] = draw(NEAR) if spelling is None else PLACE
    return _written(data).replace(PLACE, spelling or "")


SETTINGS = settings(deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))


@dataclass
class Fuzzed:
    """How the project reacted to the parameter files."""

    files: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    by_command: int = 0
    most_seconds: float = 0.0
    most_bytes: int = 0
    faults: list[str] = field(default_factory=list)


def fuzz(count: int, seed: int) -> Fuzzed:
    """Draw `count` parameter files and read each as the project does."""
    found = Fuzzed()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "params.yaml"

        @seeded(seed)
        @settings(
            max_examples=count, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
        )
        @given(near_texts() | near_texts() | CHANGES.map(changed).map(_written) | TEXTS)
        def one(text: str) -> None:
            path.write_text(text, errors="surrogatepass")
            found.files += 1
            _read(path, found)
            if found.files % BY_COMMAND == 0:
                _check_by_command(path, found)

        one()
    return found


def _written(data: dict[str, Any]) -> str:
    stream = StringIO()
    YAML(typ="safe").dump(data, stream)
    return stream.getvalue()


def _read(path: Path, found: Fuzzed) -> None:
    begun = time.monotonic()
    try:
        config.load(path)
        found.outcomes["read"] += 1
        if repr(parse_yaml(path.read_text(), path)) != repr(yamlfile.read(path)):
            found.faults.append(f"DVC reads other values: {path.read_text()[-300:]!r}")
    except ConfigError as error:
        found.outcomes["refused"] += 1
        if len(str(error)) > MOST_LETTERS or not str(error).startswith(str(path)):
            found.faults.append(f"a message that names no file, or is endless: {str(error)[:200]}")
    except Exception as error:
        found.faults.append(f"{type(error).__name__}: {error}: {path.read_text()[-300:]!r}")
    seconds = time.monotonic() - begun
    if seconds > MOST_SECONDS:
        found.faults.append(f"took {seconds:.1f} s: {path.read_text()[-300:]!r}")


def _check_by_command(path: Path, found: Fuzzed) -> None:
    begun = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "dit.cli", "check", "--params", str(path)],
        env=environment(ROOT),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said, _ = process.communicate()
    found.by_command += 1
    found.most_seconds = max(found.most_seconds, time.monotonic() - begun)
    found.most_bytes = max(found.most_bytes, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
    if process.returncode not in (0, 2) or "Traceback" in said:
        found.faults.append(f"`dit check` ended with {process.returncode}: {said[-500:]}")
    if found.most_bytes > MOST_BYTES:
        found.faults.append(f"`dit check` took {found.most_bytes} bytes")
