"""What the sections of `params.yaml` are made of: their base, and the types of their values."""

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
"""Of whole numbers that have no limit of their own. What is larger is a slip of the pen, and would fail after hours."""
PositiveInt = Annotated[int, Field(gt=0, le=LARGEST)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Threads = Annotated[int, Field(gt=0, le=1024)]
Width = Annotated[int, Field(gt=0, le=2**16)]
"""Channels of a layer."""
Depth = Annotated[int, Field(gt=0, le=1000)]
"""Blocks of a network; the deepest of Wang et al. (2022), "DeepNet: Scaling Transformers to 1,000 Layers", has 1,000."""
MOST_PIXELS = 4096
"""Height and width of an image."""
Seed = Annotated[int, Field(ge=0, lt=2**63)]
FilePath = Annotated[Path, Field(strict=False)]
MOST_SETTINGS = 1000
"""Combinations of levels in a study. Each is checked beforehand, which takes a millisecond or more."""
LEVEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", re.ASCII)
"""A level of a factor as part of the names of runs, folders and stages: 0.001, 1e-05, DiT-S_4."""
LevelName = Annotated[str, Field(pattern=f"^{LEVEL_NAME.pattern}$")]
Name = Annotated[str, Field(pattern=NAME)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are of their own kind, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
