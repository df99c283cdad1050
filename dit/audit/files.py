"""Fit the weights in files to a network: trainers add prefixes and wrappers to names, and files hold other tensors too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from torch import Tensor, nn

from dit.audit.report import Source
from dit.audit.words import brief
from dit.errors import ConfigError, DataError
from dit.init.weights import WRAPPERS, StateDict, state_dict

FACTORY = "write a function that returns (model, batch) and audit it as package.module:function"


@dataclass(frozen=True)
class Reading:
    """How to read a file: the `key` that leads to its weights, the `prefix` of their names, and patterns of names to ignore."""

    key: str = ""
    prefix: str | None = None
    """None: the prefix is found from the names."""
    ignore: tuple[str, ...] = ()
    variant: str = ""
    """Which variant to read from a diffusers directory, such as `fp16`."""


@dataclass(frozen=True)
class Weights:
    """Tensors by their names in the network, and where they were read."""

    tensors: dict[str, Tensor]
    files: tuple[Path, ...]
    holder: str = ""
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    ignored_files: tuple[str, ...] = ()
    ignored_settings: tuple[str, ...] = field(default=())

    @property
    def path(self) -> Path:
        """The file with the weights, or the folder if there are several files."""
        return self.files[0] if len(self.files) == 1 else self.files[0].parent


def read_file(path: Path, anchors: Sequence[str], reading: Reading) -> Weights:
    """The tensors of a checkpoint by their plain names; `anchors` are names of the network, by which its prefix is found.

    Raises `DataError` if the file cannot be read, and `ConfigError` if no name has the given prefix, or if several networks in
    the file have the anchors.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    return named(state_dict(path, reading.key), (path,), anchors, reading)


def named(found: StateDict, files: tuple[Path, ...], anchors: Sequence[str], reading: Reading) -> Weights:
    """The tensors of `found` by their plain names."""
    where = files[0] if len(files) == 1 else files[0].parent
    plain = _without_wrappers(found.weights, anchors, where)
    prefix = reading.prefix if reading.prefix is not None else _prefix(plain, anchors, where)
    chosen = {name: raw for name, raw in plain.items() if name.startswith(prefix)}
    if not chosen:
        raise ConfigError(f"{where}: no tensor is called {prefix}...; it has {brief(list(plain))}")
    kept, ignored = {}, list(found.others)
    for name, raw in plain.items():
        short = name.removeprefix(prefix)
        if name not in chosen or any(fnmatchcase(short, pattern) for pattern in reading.ignore):
            ignored.append(f"{found.holder}.{raw}".lstrip("."))
        else:
            kept[short] = found.weights[raw]
    return Weights(kept, files, found.holder, prefix, tuple(ignored))


def _without_wrappers(weights: Mapping[str, Tensor], anchors: Sequence[str], where: Path) -> dict[str, str]:
    """By name without wrappers inside it (wrappers at its start are kept), the name in the file."""
    own = {part for anchor in anchors for part in anchor.split(".")}
    plain: dict[str, str] = {}
    for raw in weights:
        parts = raw.split(".")
        start = next((index for index, part in enumerate(parts) if part not in WRAPPERS), 0)
        name = ".".join([*parts[:start], *(part for part in parts[start:] if part in own or part not in WRAPPERS)])
        if name in plain:
            raise ConfigError(f"{where}: '{plain[name]}' and '{raw}' are one name without wrappers; expected one of them")
        plain[name] = raw
    return plain


def _prefix(names: Mapping[str, str], anchors: Sequence[str], where: Path) -> str:
    """The prefix before most of the anchors; if several prefixes are equally frequent, the one of averaged weights."""
    found: dict[str, int] = {}
    for anchor in sorted(anchors, key=len, reverse=True):
        prefixes = [name.removesuffix(anchor) for name in names if name == anchor or name.endswith(f".{anchor}")]
        if prefixes:
            found = {prefix: sum(f"{prefix}{each}" in names for each in anchors) for prefix in prefixes}
            break
    best = [prefix for prefix, count in found.items() if count == max(found.values())]
    averaged = [prefix for prefix in best if "ema" in prefix.lower()]
    if len(best) > 1 and len(averaged) != 1:
        raise ConfigError(
            f"{where} holds {len(best)} networks, whose names begin with {', '.join(map(repr, best))}; choose with --prefix"
        )
    return (averaged if len(best) > 1 else [*best, ""])[0]


def fill(network: nn.Module, weights: Weights) -> Source:
    """Fill all weights of `network`, and say where they were read.

    Raises `DataError` if weights are missing, left over, not finite, or have other shapes or types.
    """
    own, path = network.state_dict(), weights.path
    kind = type(network).__name__
    missing = [name for name in own if name not in weights.tensors]
    if missing:
        has = f"it holds {brief(list(weights.tensors))}"
        raise DataError(f"{path} does not fit {kind}: {brief(missing)} {'is' if len(missing) == 1 else 'are'} missing; {has}")
    extra = [name for name in weights.tensors if name not in own]
    if extra:
        patterns = dict.fromkeys(f"{name.split('.')[0]}.*" if "." in name else name for name in extra)
        options = " ".join(f"--ignore '{pattern}'" for pattern in patterns)
        raise DataError(f"{path} does not fit {kind}, which has no {brief(extra)}; leave them out with {options[:300]}")
    for name, tensor in own.items():
        _check(name, weights.tensors[name], tensor, path, kind)
    try:
        network.load_state_dict(weights.tensors, strict=True)
    except RuntimeError as error:
        raise DataError(f"{path} does not fit {kind}: {' '.join(str(error).split())[:500]}") from None
    return Source(
        files=tuple(str(file) for file in weights.files),
        holder=weights.holder,
        prefix=weights.prefix,
        read=tuple(weights.tensors),
        ignored=weights.ignored,
        ignored_files=weights.ignored_files,
        ignored_settings=weights.ignored_settings,
    )


def _check(name: str, given: Tensor, own: Tensor, path: Path, kind: str) -> None:
    if given.shape != own.shape:
        raise DataError(f"{path} does not fit {kind}: '{name}' has shape {tuple(given.shape)}; expected {tuple(own.shape)}")
    if given.is_floating_point() != own.is_floating_point() or given.is_quantized:
        raise DataError(
            f"{path}: '{name}' is {given.dtype}; expected {own.dtype}, or another floating type: not quantised weights"
        )
    if given.is_floating_point() and not bool(given.float().isfinite().all()):
        count = int((~given.float().isfinite()).sum())
        raise DataError(f"{path}: {count:,} of {given.numel():,} entries of '{name}' are not finite; expected numbers")
