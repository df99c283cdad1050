"""The base class of the sections of `params.yaml`, and the types of their values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from dit.errors import NAME

Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Backend = Literal["auto", "fused", "compiled", "eager"]
Fraction = Annotated[float, Field(ge=0, le=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
LARGEST = 10**9
"""Largest whole number of a parameter that has no other limit. A larger number is a typing error, which would otherwise show
only after hours.
"""
PositiveInt = Annotated[int, Field(gt=0, le=LARGEST)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Threads = Annotated[int, Field(gt=0, le=1024)]
Width = Annotated[int, Field(gt=0, le=2**16)]
"""Number of channels of a layer."""
Depth = Annotated[int, Field(gt=0, le=1000)]
"""Number of blocks of a network. The deepest one of Wang et al. (2022), "DeepNet: Scaling Transformers to 1,000 Layers", has
1,000 layers.
"""
MOST_PIXELS = 4096
"""Largest height and width of an image."""
Seed = Annotated[int, Field(ge=0, lt=2**63)]
FilePath = Annotated[Path, Field(strict=False)]
MOST_SETTINGS = 1000
"""Most combinations of levels in a study. Each is checked before the study runs, which takes a millisecond or more."""
LEVEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", re.ASCII)
"""What a level of a factor looks like in the names of runs, folders and stages: 0.001, 1e-05, DiT-S_4."""
LevelName = Annotated[str, Field(pattern=f"^{LEVEL_NAME.pattern}$")]
Name = Annotated[str, Field(pattern=NAME)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are not converted to other types, and sections are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
