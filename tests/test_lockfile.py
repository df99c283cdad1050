"""`dvc.lock` is changed entry by entry, and has the bytes that DVC itself writes; whoever waits for DVC's lock gets it."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Timer
from typing import Any

import pytest
from dvc import lock as dvc_lock
from dvc.utils.serialize import dumps_yaml, modify_yaml, parse_yaml
from hypothesis import given, settings, strategies as st

from pipelines import atomic_dvc
from pipelines.lockfile import LockFile

NAMES = st.text("abcz019@=,._-é", min_size=1, max_size=200) | st.sampled_from(
    ["null", "010", "it's", "it's: x", "? x", "- a", "#"]
)
WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=200) | st.just("*.png & ~ # 0x1")
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
)
FILES = st.lists(
    st.fixed_dictionaries({"path": WORDS, "md5": st.text("0123456789abcdef", min_size=32, max_size=32)}), max_size=3
)
ENTRIES = st.fixed_dictionaries(
    {"cmd": WORDS}, optional={"deps": FILES, "params": st.dictionaries(WORDS, VALUES, max_size=3), "outs": FILES}
)
LOCKS = st.dictionaries(NAMES, ENTRIES, min_size=1, max_size=5)


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    atomic_dvc.install()


def lock(stages: dict[str, Any], **more: Any) -> str:
    """A `dvc.lock` as DVC formats it in one piece."""
    return dumps_yaml({"schema": "2.0", "stages": stages, **more})


@settings(deadline=None)
@given(LOCKS, NAMES, ENTRIES)
def test_a_lock_of_which_one_entry_changes_has_the_bytes_that_dvc_writes(
    stages: dict[str, Any], name: str, entry: dict[str, Any]
) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "dvc.lock"
        path.write_text(lock(stages))
        with modify_yaml(path) as data:
            for known, content in stages.items():
                assert data["stages"].get(known) == content
            assert data["stages"].get("another stage", {}) == {}
            data["stages"].update({name: entry})
        assert path.read_text() == lock({**stages, name: entry})


@settings(deadline=None)
@given(LOCKS, st.randoms(use_true_random=False))
def test_a_lock_in_another_order_has_the_bytes_that_dvc_writes(stages: dict[str, Any], chance: Any) -> None:
    order = list(stages)
    chance.shuffle(order)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "dvc.lock"
        path.write_text(lock(stages))
        LockFile(path, order).write()
        assert path.read_text() == lock({name: stages[name] for name in order})
        assert LockFile(path, order).written


@pytest.mark.parametrize(
    "text",
    [
        "# ours\nschema: '2.0'\nstages:\n  a:\n    cmd: x\n",
        "schema: '2.0'\nstages:\n  # ours\n  a:\n    cmd: x\n",
        "schema: '2.0'\nstages:\n  a:\n    cmd: x # ours\n",
        "schema: '2.0'\nstages:\n  a: &a\n    cmd: x\n  b: *a\n",
        "schema: '2.0'\nstages:\n    a:\n        cmd: x\n",
        "schema: '2.0'\nstages:\n  a:\n    cmd: x\n    deps:\n      - path: y\n",
        "schema: '2.0'\nstages: {a: {cmd: x}}\n",
        "stages:\n  a:\n    cmd: x\nschema: '2.0'\n",
        "schema: '2.0'\nstages:\n  a:\n    cmd: x\ndatasets:\n- name: photos\n",
        "schema: '2.0'\ndatasets:\n- name: photos\nstages:\n  a:\n    cmd: x\n",
        "schema: '2.0'\nstages: {}\n",
        "schema: '2.0'\nstages:\n  a:\n    cmd: x",
    ],
)
def test_a_lock_in_another_layout_loses_nothing(text: str, tmp_path: Path) -> None:
    path = tmp_path / "dvc.lock"
    path.write_text(text)
    before = parse_yaml(text, "dvc.lock")
    with modify_yaml(path) as data:
        data["stages"].update({"c": {"cmd": "y"}})
    after = parse_yaml(path.read_text(), "dvc.lock")
    assert after == {**before, "stages": {**before["stages"], "c": {"cmd": "y"}}}
    LockFile(path, ["c"]).write()
    assert parse_yaml(path.read_text(), "dvc.lock") == after


def test_data_of_dvc_that_is_added_to_a_lock_stands_beside_its_stages(tmp_path: Path) -> None:
    path = tmp_path / "dvc.lock"
    path.write_text(lock({"a": {"cmd": "x"}}))
    with modify_yaml(path) as data:
        data.setdefault("datasets", []).append({"name": "photos"})
    assert path.read_text() == lock({"a": {"cmd": "x"}}, datasets=[{"name": "photos"}])


def test_who_waits_for_the_lock_of_a_project_tries_more_often_than_dvc_and_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = []
    attempt = dvc_lock.Lock._do_lock
    holder, patient = (dvc_lock.Lock(str(tmp_path / "lock"), wait=True) for _ in range(2))
    holder.lock()
    monkeypatch.setattr(dvc_lock.Lock, "_do_lock", lambda self: (attempts.append(self), attempt(self)))
    Timer(1, holder.unlock).start()
    patient.lock()
    assert patient.is_locked
    assert len(attempts) > 5  # DVC itself makes 3 in this time
    patient.unlock()


def test_who_does_not_wait_for_the_lock_of_a_project_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dvc_lock, "DEFAULT_TIMEOUT", 0.1)
    holder, hasty = (dvc_lock.Lock(str(tmp_path / "lock")) for _ in range(2))
    holder.lock()
    with pytest.raises(dvc_lock.LockError):
        hasty.lock()
    assert not hasty.is_locked
    holder.unlock()
