"""Keep DVC's index of a project in the project's own folder, where no other user of the machine can read or write it.

By default DVC keeps the index below /var/tmp/dvc, in folders that every user may write. It holds checksums, which DVC trusts,
and pickles, which DVC loads: whoever can write there decides what counts as an output, and can run commands.
"""

from __future__ import annotations

import os
from contextlib import suppress
from functools import cache
from pathlib import Path

from dvc.config import Config
from dvc.exceptions import DvcException

VARIABLE = "DVC_SITE_CACHE_DIR"
"""The environment variable by which a person chooses another place."""
KEY = "site_cache_dir"
PLACE = Path(".dvc/tmp/site")


@cache
def keep(root: Path) -> None:
    """Make every `dvc` command in `root` keep its index there, by `.dvc/config.local`, unless the user has chosen a place."""
    if os.environ.get(VARIABLE) or not (root / ".dvc").is_dir():
        return
    place = (root / PLACE).absolute()
    try:
        config = Config(str(root / ".dvc"))
    except DvcException:  # whatever opens the project next reports what is wrong
        return
    chosen = config["core"].get(KEY)
    if chosen and not chosen.endswith(str(PLACE)):
        return
    with suppress(OSError):  # the folder cannot be written, or it belongs to another user
        folder(place)
        if chosen != str(place):  # no place yet, or the place of a folder from which this one was copied
            with config.edit("local") as settings:
                settings["core"][KEY] = str(place)


def folder(place: Path) -> None:
    """Make a folder that only its owner may enter; DVC would make one in which everybody may write."""
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    place.chmod(0o700)
