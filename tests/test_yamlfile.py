"""Whatever stands in a parameter file, the answer is its values or one short message, soon and in little memory."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from chaos.parameters import CHANGES, MOST_LETTERS, TEXTS, changed
from hypothesis import given, settings
from studies import command
from typer.testing import CliRunner

from dit import config, yamlfile
from dit.cli import app
from dit.errors import ConfigError

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{below}: &{below} [{', '.join([f'*{above}'] * 10)}]\n" for above, below in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "line 5: more than 20000 values, counting an alias as what it stands for"),
        ("a: &a [*a]", r"line 1: \*a holds itself"),
        ("&a {b: {c: *a}}", r"line 1: \*a holds itself"),
        ("a: *b", r"line 1: \*b is not known"),
        ("a: " + "[" * 5000 + "]" * 5000, "line 1: values lie inside each other more than 64 deep"),
        ("- " * 100_000, "more than 64 deep"),
        ("a: [" + "1," * 200_000 + "]", "more than 20000 values"),
        ("a: !!int abc", "line 1: the tag !!int is not read here; write the value without it"),
        ("a: !!python/object/apply:os.system [ls]", "the tag !!python/object/apply:os.system is not read here"),
        ("a: 2020-13-45", "not valid YAML: month must be in 1..12"),
        (f"a: {'9' * 5000}", "not valid YAML: "),
        ("a: b\0", "not valid YAML: "),
        ("a: 1\na: 2", "line 2: found duplicate key"),
        ("", "expected sections such as `study:` and `train:`, and found NoneType"),
        ("[1]", "expected sections such as `study:` and `train:`, and found list"),
    ],
)
def test_what_no_person_writes_is_one_short_message(text: str, message: str) -> None:
    begun = time.monotonic()
    with pytest.raises(ConfigError, match=message) as error:
        config.parse(yamlfile.parse(text, "params.yaml"))
    assert time.monotonic() - begun < 30
    assert str(error.value).startswith("params.yaml: ")
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("größe: 1".encode("latin-1"), "byte 2 is not UTF-8; save the file in UTF-8"),
        ("a: 1".encode("utf-16"), "byte 0 is not UTF-8"),
        (b"#" * (yamlfile.MOST_BYTES + 1), "1048577 bytes, but at most 1048576 are read; is it the right file?"),
    ],
)
def test_a_file_in_another_encoding_or_of_another_kind_is_told(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "params.yaml").write_bytes(data)
    with pytest.raises(ConfigError, match=rf"params\.yaml: .*{message}"):
        config.load(tmp_path / "params.yaml")
    os.mkfifo(tmp_path / "pipe")
    for name in (".", "pipe"):
        with pytest.raises(ConfigError, match="not a file"):
            config.load(tmp_path / name)


def test_aliases_that_a_person_writes_are_read() -> None:
    assert yamlfile.parse("a: &a {x: 1}\nb: [*a, *a]\nc: {<<: *a, y: 2}", "") == {
        "a": {"x": 1},
        "b": [{"x": 1}, {"x": 1}],
        "c": {"x": 1, "y": 2},
    }


@settings(deadline=None, max_examples=300)
@given(CHANGES)
def test_any_value_anywhere_is_read_or_one_message(changes: list[tuple[tuple[str, str], Any]]) -> None:
    try:
        config.parse(changed(changes))
    except ConfigError as error:
        said = str(error)
        assert said.isprintable() or "\n" in said
        assert len(said) < MOST_LETTERS


@settings(deadline=None, max_examples=300)
@given(TEXTS)
def test_any_text_is_read_or_one_message(text: str) -> None:
    with suppress(ConfigError):
        yamlfile.parse(text, "params.yaml")


def test_dit_check_ends_with_one_line_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(BOMB)
    done = command(tmp_path, "dit.cli", "check", fresh=True)
    assert done.returncode == 2
    assert done.stdout.startswith("error: params.yaml: not valid YAML: line 5: more than 20000 values")
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["wakeup", "--steps", "1000000000"],
        ["init", "--seed", str(2**63)],
        ["audit", "strategy:adaln_zero", "--seed", str(2**63)],
    ],
)
def test_numbers_of_a_command_have_an_upper_limit(arguments: list[str]) -> None:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert "less than or equal" in done.output
