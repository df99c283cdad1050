"""Spelling, for `make lint`: misspelt words, and American spelling, which codespell's dictionary has the other way round."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import NamedTemporaryFile

import codespell_lib

ROOT = Path(__file__).resolve().parents[1]
AMERICAN = Path(codespell_lib.__file__).parent / "data" / "dictionary_en-GB_to_en-US.txt"
SKIPPED = (".lock", ".svg", ".json", ".jpg", "LICENSE")
MADE = ("docs/evidence/answers.md",)
"""Pages that a program makes, with names of parameters in sentences."""
CODE = r"```.*?```|`[^`]*`"
"""In a page: names, which are spelt as their libraries spell them."""
BRITISH = "program,programs,artifact,artifacts,biased"
"""Words of computing and statistics that are spelt so in Britain too."""
NAMES = (
    "authorization,center,centered,color,colors,finalize,initialization,license,math,"
    "normalization,normalize,optimizer,serialization,serialize,synchronize"
)
"""In code: names of torch, diffusers, matplotlib and others."""
MEANT = "dout,linaer,packag,precison,trian,vectorized,widht"
"""A name in kernels, and mistakes that tests make on purpose."""


def main() -> int:
    """Print every word that is spelt wrongly, with where it stands; the number of such runs that found any."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    files = [name for name in listed.stdout.splitlines() if not name.endswith(SKIPPED) and (ROOT / name).is_file()]
    pages = [name for name in files if name.endswith(".md") and name not in MADE]
    code = [name for name in files if name not in pages and name != "docs/spelling.py"]
    with NamedTemporaryFile("w", suffix=".txt") as dictionary:
        for line in AMERICAN.read_text(encoding="utf-8").splitlines():
            british, _, american = line.partition("->")
            dictionary.writelines(f"{word.strip()}->{british}\n" for word in american.split(",") if word.strip())
        dictionary.flush()
        options = ["--dictionary", "-", "--dictionary", dictionary.name, "--ignore-words-list"]
        found = codespell_lib.main(*options, f"{BRITISH},{MEANT}", "--ignore-multiline-regex", CODE, *pages)
        return found + codespell_lib.main(*options, f"{BRITISH},{NAMES},{MEANT}", *code)


if __name__ == "__main__":
    sys.exit(bool(main()))
