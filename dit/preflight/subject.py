"""The subject of the checks: the parameters of a study at all its settings, and what is known so far about their images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from dit import design
from dit.config import Params


@dataclass(frozen=True)
class Counts:
    """How many images of each class a source has for training and for validation."""

    train: tuple[int, ...]
    validation: tuple[int, ...]

    @property
    def total(self) -> int:
        """Images of both splits."""
        return sum(self.train) + sum(self.validation)


@dataclass
class Subject:
    """The settings of a study with their numbers of runs, and the kinds of stages that will run (None for all)."""

    settings: list[tuple[Params, int]]
    stages: Collection[str] | None
    counts: dict[str, Counts] = field(default_factory=dict)
    """Counts of images by `key(params, "images")`; a source whose images are only sampled, not counted, has no entry."""

    @classmethod
    def of(cls, params: Params, where: str, stages: Collection[str] | None) -> Subject:
        """The study that `params` describe. Raises `ConfigError` where a level does not fit the other parameters."""
        runs = Counter(run.setting.values for run in design.design(params.study).runs)
        return cls([(found, runs[values]) for values, found in design.check(params, where).items()], stages)

    def runs(self, *stages: str) -> bool:
        """Whether a stage of any of these kinds will run."""
        return self.stages is None or any(stage in self.stages for stage in stages)

    def distinct(self, *sections: str) -> Iterator[Params]:
        """For each different content of `sections`, the parameters of one setting that has it."""
        yield from {key(params, *sections): params for params, _ in reversed(self.settings)}.values()

    def counts_of(self, params: Params) -> Counts | None:
        """The counts of images of a setting; None if unknown."""
        return self.counts.get(key(params, "images"))


def key(params: Params, *sections: str) -> str:
    """A text of the content of these sections, by which settings are compared."""
    return repr([getattr(params, section) for section in sections])
