"""The optimiser settings of a study, in words, from the values of its profile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DEFAULTS: dict[str, Any] = {
    "train.optimizer.name": "adamw",
    "train.optimizer.betas": [0.9, 0.999],
    "train.schedule.name": "constant",
    "train.schedule.warmup_steps": 0,
    "train.gradient_clip": None,
    "train.ema_decay": 0.97,
    "train.precision": "auto",
    "train.backend": "auto",
}
"""What params.yaml has held since before the first study. A profile must name what it needs if params.yaml changes."""

OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon in the blocks and AdamW elsewhere"}


def in_words(values: Mapping[str, Any]) -> str:
    """The optimiser, schedule, clipping and averaging of a study in words, and which of these factors change."""
    found = {key: _value(values, key) for key in DEFAULTS}
    name, beta2 = found["train.optimizer.name"], found["train.optimizer.betas"][1]
    optimizer = f"{OPTIMIZERS.get(name, name)} with β₂ = {beta2:g}"
    warmup = found["train.schedule.warmup_steps"]
    schedule = f"{found['train.schedule.name']} rate, {f'warm-up of {warmup} steps' if warmup else 'no warm-up'}"
    clip, varied = found["train.gradient_clip"], _varied(values)
    clipping = "no clipping" if clip is None else f"gradients clipped at norm {clip:g}"
    named = [f"{word} {found[key]}" for word in ("precision", "backend") if (key := f"train.{word}") in values]
    return ", ".join(
        [
            *(
                f"{words} (unless factors say otherwise)" if f"train.{section}" in varied else words
                for section, words in (("optimizer", optimizer), ("schedule", schedule), ("gradient_clip", clipping))
            ),
            f"EMA {found['train.ema_decay']:g}",
            *named,
        ]
    )


def constant_rate(values: Mapping[str, Any]) -> bool:
    """Whether every run trains at a constant rate, without a warm-up."""
    constant = _value(values, "train.schedule.name") == "constant" and not _value(values, "train.schedule.warmup_steps")
    return constant and "train.schedule" not in _varied(values)


def _value(values: Mapping[str, Any], key: str) -> Any:
    """A value by its dotted key, also where the profile replaces the whole section that holds it."""
    section, _, last = key.rpartition(".")
    return values.get(key, values.get(section, {}).get(last, DEFAULTS[key]))


def _varied(values: Mapping[str, Any]) -> set[str]:
    """The sections of the parameters that the study varies, such as `train.schedule`."""
    keys = [*values.get("study.factors", {}), *(key for levels in values.get("study.settings", {}).values() for key in levels)]
    return {".".join(key.split(".")[:2]) for key in keys}
