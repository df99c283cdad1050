"""A hook of MkDocs: the pages that lie at the root of the repository, and links from pages to its files.

`README.md` becomes the first page. A link to a file outside `docs`, such as `../dit/library.yaml`, leads to a copy of that file
in the site; a link to a folder becomes plain text. So every link works without a network, and `--strict` finds dead ones.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
"""Files at the root, and the pages that they become."""
SOURCE = "source"
"""The folder of the site for copies of files from outside `docs`."""
FOLDER = re.compile(r"\[([^\[\]]+)\]\(([^)\s#:]+)\)")
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of `PAGES`, and copies of the files that any page links to."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    written = [ROOT / name for name in PAGES]
    written += [Path(page.abs_src_path) for page in files.documentation_pages() if page.abs_src_path]
    for path in sorted({target for page in written for target in _outside(page)}):
        files.append(File.generated(config, f"{SOURCE}/{path.relative_to(ROOT).as_posix()}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """The text of a page with links as they are in the site."""
    names = {made: name for name, made in PAGES.items()}
    here = page.file.src_uri
    written = ROOT / names[here] if here in names else DOCS / here

    def rewritten(match: re.Match[str]) -> str:
        target = _target(written, match[1])
        if target in (ROOT / name for name in PAGES):
            place = PAGES[target.name]
        elif target.is_relative_to(DOCS):
            place = target.relative_to(DOCS).as_posix()
        else:
            place = f"{SOURCE}/{target.relative_to(ROOT).as_posix()}"
        return f"]({os.path.relpath(place, Path(here).parent)}{match[2] or ''})"

    without_folders = FOLDER.sub(lambda match: match[1] if _target(written, match[2]).is_dir() else match[0], markdown)
    return LINK.sub(rewritten, without_folders)


def _outside(page: Path) -> Iterator[Path]:
    """The files outside `docs`, other than pages, that a page links to."""
    for link, _ in LINK.findall(page.read_text(encoding="utf-8")):
        target = _target(page, link)
        if target.is_file() and not target.is_relative_to(DOCS) and target not in (ROOT / name for name in PAGES):
            yield target


def _target(page: Path, link: str) -> Path:
    """What a link in the file `page` leads to, below the root. Raises `ValueError` where that lies outside the repository."""
    target = Path(os.path.normpath(page.parent / link))
    target.relative_to(ROOT)
    return target
