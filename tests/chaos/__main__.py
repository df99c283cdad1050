"""`make chaos`: disturb micro studies, compare them with an undisturbed one, and read parameter files that nobody would write.

Processes of every kind are killed or stopped, at random moments or while a file of a certain kind is being written; bits of
files are flipped; disks fill up, memory runs out, the clock jumps, servers are killed. The seed decides which disturbance comes
when; what it hits depends on the machine's speed as well.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
from chaos.campaign import Found, campaign  # noqa: E402
from chaos.conditions import possible  # noqa: E402
from chaos.parameters import fuzz  # noqa: E402


def main() -> None:
    """Run a campaign, write what it found, and exit with 1 if it found any fault."""
    arguments = argparse.ArgumentParser(prog="make chaos", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--minutes", type=float, default=30.0, help="start new studies for this long (default: 30)")
    arguments.add_argument("--seed", type=int, default=None, help="seed of the disturbances (default: drawn)")
    arguments.add_argument("--files", type=int, default=1000, help="parameter files that are read (default: 1000)")
    arguments.add_argument("--only", choices=possible(), help="one condition instead of all in turn")
    arguments.add_argument("--output", type=Path, default=Path(".scratch/chaos.json"))
    given = arguments.parse_args()
    begun = time.monotonic()
    found = Found(random.randrange(10**6) if given.seed is None else given.seed)
    conditions = [given.only] if given.only else possible()
    print(f"seed {found.seed}; conditions: {', '.join(conditions)}", flush=True)
    files = fuzz(given.files, found.seed) if given.files else None
    if files:
        _tell(f"{files.files} parameter files: {dict(files.outcomes)}, {len(files.faults)} faults")
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.chmod(0o755)
    for _ in campaign(folder, found, conditions, _tell) if given.minutes else ():
        _write(given.output, found, files, time.monotonic() - begun)
        if time.monotonic() > begun + 60 * given.minutes:
            break
    _write(given.output, found, files, time.monotonic() - begun)
    if found.faults or (files and files.faults):
        sys.exit(1)
    shutil.rmtree(folder)


def _tell(text: str) -> None:
    print(text, flush=True)


def _write(path: Path, found: Found, files: Any, seconds: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"minutes": round(seconds / 60, 1), **vars(found), "kills": found.kills}
    if files:
        result["parameter_files"] = vars(files)
    path.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
