"""Names for a run's place in the study: its factors, levels and data in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit.analysis.study import Place
from dit.config import Params
from dit.design import Run, Setting
from dit.sections import FolderSource, HuggingFaceSource, IdxSource, UnlabelledSource

LEARNING_RATE = "train.learning_rate"
LONGEST_LIST = 30
"""Most letters of a list that stands for itself in a table."""


def place_of(params: Params, run: Run) -> Place:
    """The level of every factor except the learning rate, in words, without parameters that only this strategy has."""
    left = {key: level for key, level in run.setting.levels.items() if key not in params.study.fixed(run.strategy)}
    return tuple((word(key), level_of(run.setting, key)) for key in left if key != LEARNING_RATE)


def own_of(params: Params, run: Run) -> str:
    """The parameters that only this strategy has, except its learning rate, in words."""
    own = params.study.fixed(run.strategy)
    return ", ".join(f"{word(key)} {level_of(run.setting, key)}" for key in own if key != LEARNING_RATE)


def word(key: str) -> str:
    """A factor in words: `model`, `optimizer`, `learning rate`."""
    return key.removesuffix(".name").rpartition(".")[2].replace("_", " ")


def level_of(setting: Setting, key: str) -> str:
    """A level in words: text as it is, other levels by their name in the study, if they have one.

    A level without a name is told by its value, but a section or a long list by the name of the whole setting.
    """
    level = setting.levels[key]
    if isinstance(level, str):
        return level
    words = json.dumps(level)
    named = setting.named.get(key, "").partition("=")[2]
    whole = "{" in words or len(words) > LONGEST_LIST
    return named or (setting.name if whole and isinstance(level, (dict, list)) else words)


def data_of(params: Params, levels: Mapping[str, Any]) -> str:
    """The images of a run in words, such as `photos at 32 px`; images from a folder have the folder's name."""
    images = params.with_values({key: level for key, level in levels.items() if key.startswith("images.")}).images
    source = images.source
    match source:
        case FolderSource() | UnlabelledSource() | IdxSource():
            name = Path(source.root).name
        case HuggingFaceSource():
            name = source.path
        case _:
            name = source.kind
    return f"{name} at {images.size} px"
