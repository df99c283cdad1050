"""How much memory and disk space a machine has, found without a library that would initialise a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import torch

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Files in which Linux says how much memory a container may use.

Kernel documentation, admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
"""


def of_host() -> int | None:
    """Bytes of memory that all programs on this machine or in this container may use together; None if unknown."""
    try:
        found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (ValueError, OSError):
        return None
    for name in LIMITS:
        try:
            found.append(int(Path(name).read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return min(found)


def of(device: torch.device) -> int | None:
    """Bytes of memory of a device; None if unknown. For a GPU, `nvidia-smi` tells, so that this process, which may fork, does
    not initialise the driver.
    """
    if device.type != "cuda":
        return of_host()
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout
        return min(int(line) for line in said.split()) * 2**20
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def free_disk(path: Path) -> int:
    """Free bytes on the disk on which `path` is or will be."""
    existing = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
    return shutil.disk_usage(existing).free


def shown(count: float) -> str:
    """A number of bytes with its unit, such as "1.5 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB" if count < 1e6 else f"{count:.0e} TB"
