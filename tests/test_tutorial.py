"""The tutorial runs from its first block to its last, as a person would paste them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from studies import ROOT

SHORT = {"STEPS = 300": "STEPS = 12", "range(200)": "range(30)", "steps=20": "steps=4"}
"""What the test changes, so that it takes seconds."""


def test_the_tutorial_leads_from_pictures_to_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    for long, short in SHORT.items():
        assert text.count(long) == 1
        text = text.replace(long, short)
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 7
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/tutorial.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "60 pictures of ['cross', 'disc']" in printed
    assert "head_xavier" in str(names["answer"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my-model", "pictures", "sample-cross.png", "sample-disc.png"]
