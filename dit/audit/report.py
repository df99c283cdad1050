"""What an audit found: the findings, what they amount to in words, and how they are printed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, computed_field
from rich.console import Console, ConsoleOptions, RenderResult

from dit.audit.expectations import EXPECTATIONS, TOPICS, Expectation, asleep, known, symmetric
from dit.audit.printing import printed
from dit.audit.words import brief, capital, grouped, without_effect
from dit.terminal import plain

Part = Literal["sample", "timestep", "label", "text", "other"]
Place = Literal["block", "shared", "final"]
Gates = Literal["modulation", "other layers", "both", "unknown"]
"""What makes the blocks the identity: modulation that starts at zero, other layers that do, both, or it is not known."""
Topic = Literal["output", "blocks", "modulation", "gradients"]
State = Literal["zero", "zero weight", "partly zero", "constant", "random"]
STATES: dict[State, str] = {"zero weight": "the same for every input (zero weight, but not bias)"}
"""In words, for states whose name does not say enough."""


class AuditFinding(BaseModel):
    """One thing that an audit found; a plain record."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")


class Output(AuditFinding):
    """The first output: root mean square, loss, and the loss of an output that is zero (None where it cannot be known).

    `path` locates it in what the network returns; empty if it is the whole of it.
    """

    path: str
    shape: tuple[int, ...]
    finite: bool
    zero: bool
    constant: bool
    rms: float
    loss: float
    zero_loss: float | None


class Block(AuditFinding):
    """A block of the network. `change` is the RMS of output minus input over that of the input, the largest of all streams."""

    path: str
    kind: str
    change: float
    identity: bool


class Input(AuditFinding):
    """An input, and the relative change of the output when it is exchanged between samples; None where that cannot be done."""

    name: str
    part: Part
    shape: tuple[int, ...]
    dtype: str
    at_start: float | None
    after_steps: float | None


class Layer(AuditFinding):
    """A layer that matters for what the network starts as, how it starts, and the inputs that it depends on."""

    path: str
    place: Place
    state: State
    zero_rows: str
    driven_by: tuple[str, ...]


class Wake(AuditFinding):
    """Rows of a tensor (all of them where `rows` is empty) and the step, from 0, of their first gradient.

    Where `step` is None they had none: `unused` (not in the graph of the loss), `rounding` (nothing but rounding, as for the
    bias of attention keys, which softmax does not see), or `zero`.
    """

    tensor: str
    rows: str
    step: int | None
    reason: Literal["unused", "rounding", "zero"] | None


class Units(AuditFinding):
    """Units of a layer, rows of its weight with their biases, that start equal.

    `still_equal` counts those that moved and moved alike, which is a symmetry; `unmoved` those that did not move, of which
    nothing is known. `period` is the distance between equal rows where it is regular, as for equal attention heads.
    """

    layer: str
    units: int
    distinct: int
    still_equal: int
    unmoved: int
    period: int | None


class TensorValues(AuditFinding):
    """A tensor whose entries all have one value."""

    tensor: str
    value: float


class Doubt(AuditFinding):
    """Why one kind of finding is not certain, so that nothing is concluded from it."""

    about: Topic
    reason: str


class Trained(AuditFinding):
    """Matrices that could be judged by their statistics, and those of them that no initialisation draws like that."""

    matrices: int
    moved: int
    likely: bool


class Source(AuditFinding):
    """Where weights were read: which tensors of which files, and what was left alone."""

    files: tuple[str, ...]
    holder: str
    """Keys of the file under which they were."""
    prefix: str
    """What stood before their names."""
    read: tuple[str, ...]
    """Names of tensors, as the network has them."""
    ignored: tuple[str, ...]
    """Names of tensors, as the file has them."""
    ignored_files: tuple[str, ...]
    ignored_settings: tuple[str, ...]
    """Keys of the configuration that the class does not take."""


class AuditReport(AuditFinding):
    """Everything that `dit.audit.audit` found. `model_dump_json` and `model_validate_json` make a round trip."""

    model: str
    parameters: int
    trainable: int
    precision: str
    steps: int
    samples: int
    """In the batch."""
    repeated: tuple[str, ...]
    """Lists of blocks that are alike, whose indices are written `*`."""
    output: Output
    output_layer: Layer | None
    blocks: tuple[Block, ...]
    inputs: tuple[Input, ...]
    modulation: tuple[Layer, ...]
    wakes: tuple[Wake, ...]
    units: tuple[Units, ...]
    values: tuple[TensorValues, ...]
    gates: Gates | None
    """What makes the blocks the identity; None where they are not."""
    doubts: tuple[Doubt, ...]
    trained: Trained | None
    """None where no matrix is large enough to tell."""
    source: Source | None = None
    """None where weights were read from no file."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def verdict(self) -> str:
        """What the network is at start, in words."""
        return plain(f"{self._name()}: {' '.join(capital(sentence) + '.' for sentence in self._sentences())}")

    def _name(self) -> str:
        if self.was_trained and self.output.finite:
            return "Trained"
        if not self.failures("adaln-zero"):
            return "adaLN-Zero"
        return "Not adaLN-Zero" if self.reasons("adaln-zero") else "Undecided"

    @property
    def was_trained(self) -> bool:
        """Whether the weights are those of a trained network, by their statistics."""
        return self.trained is not None and self.trained.likely

    def failures(self, expectation: Expectation | str) -> list[str]:
        """Reasons against an expectation, then doubts about it; empty if the network certainly meets it.

        Raises `ConfigError` for an unknown name.
        """
        return self.reasons(expectation) + self.reservations(expectation)

    def reasons(self, expectation: Expectation | str) -> list[str]:
        """What was found against an expectation."""
        return [reason for check in EXPECTATIONS[known(expectation)] for reason in check(self)]

    def reservations(self, expectation: Expectation | str) -> list[str]:
        """Why an expectation cannot be judged."""
        topics = TOPICS[known(expectation)]
        found = [f"it cannot be told: {doubt.reason}" for doubt in self.doubts if doubt.about in topics]
        if self.was_trained:
            found.append("the weights are trained, and do not tell how they started")
        return found

    def expect(self, expectation: Expectation | str) -> None:
        """For a test: raise `AssertionError` with the reasons and the verdict unless the network meets the expectation."""
        reasons = self.failures(expectation)
        if reasons:
            raise AssertionError(f"expected {expectation}, but {'; '.join(reasons)}\n{self.verdict}")

    def collapse(self, names: Iterable[str], among: Iterable[str]) -> list[str]:
        """Paths with the index of repeated blocks written `*`; with a count where only some of the blocks `among` are meant."""
        every: dict[str, int] = {}
        for name in among:
            every[self._pattern(name)] = every.get(self._pattern(name), 0) + 1
        chosen: dict[str, list[str]] = {}
        for name in names:
            chosen.setdefault(self._pattern(name), []).append(name)
        found = []
        for pattern, members in chosen.items():
            total = every.get(pattern, len(members))
            if len(members) == 1:
                found.append(members[0])
            else:
                found.append(pattern if len(members) == total else f"{pattern} ({len(members)} of {total})")
        return found

    def tensors(self, wakes: Sequence[Wake]) -> list[str]:
        """The tensors, with their rows, of some of the wakes."""
        every = {wake.tensor for wake in self.wakes}
        return [
            f"{name}{rows}"
            for rows, alike in grouped(wakes, lambda wake: wake.rows)
            for name in self.with_both((wake.tensor for wake in alike), every)
        ]

    def with_both(self, names: Iterable[str], among: Iterable[str]) -> list[str]:
        """Collapsed names, with a weight and its bias on one line."""
        collapsed = self.collapse(names, among)
        merged = []
        for name in collapsed:
            stem, dot, kind = name.rpartition(".")
            if kind == "bias" and f"{stem}.weight" in collapsed:
                continue
            merged.append(f"{stem}{dot}{{weight,bias}}" if kind == "weight" and f"{stem}.bias" in collapsed else name)
        return merged

    def state_now(self, state: State) -> str:
        """A state in words; what training has made of weights is not called random."""
        return "trained" if state == "random" and self.was_trained else state

    def _pattern(self, name: str) -> str:
        for path in self.repeated:
            name = re.sub(rf"^{re.escape(path)}\.\d+(?=\.|$)" if path else r"^\d+(?=\.|$)", f"{path}.*".lstrip("."), name)
        return name

    def _sentences(self) -> Iterator[str]:
        if not self.output.finite:
            yield "the output is not finite"
            return
        if self.trained is not None and self.was_trained:
            yield (
                f"{self.trained.moved} of {self.trained.matrices} matrices are trained, by their statistics, so how the "
                "network started is not known; what follows is about the weights as they are"
            )
        yield self._about_blocks()
        for place, words in (("block", "block modulation"), ("shared", "shared modulation"), ("final", "final modulation")):
            layers = [layer for layer in self.modulation if layer.place == place]
            for state, members in grouped(layers, lambda layer: (layer.state, layer.zero_rows)):
                paths = brief(self.collapse((layer.path for layer in members), (layer.path for layer in layers)))
                told = STATES.get(state[0], f"{self.state_now(state[0])} {state[1]}".strip())
                yield f"{words} is {told}{'' if self.was_trained else ' at start'} ({paths})"
        yield self._about_output()
        still = [item.name for item in self.inputs if without_effect(item.after_steps)]
        if still:
            yield f"still without effect on the output after {self.steps} steps: {', '.join(still)}"
        yield from (f"it cannot be told: {doubt.reason}" for doubt in self.doubts)
        yield from (reason for check in (asleep, symmetric) for reason in check(self))

    def _about_blocks(self) -> str:
        if not self.blocks:
            return "no block was found"
        identical = [block for block in self.blocks if block.identity]
        if len(identical) == len(self.blocks):
            return f"all {len(self.blocks)} blocks are the identity"
        if not identical:
            changes = [block.change for block in self.blocks]
            return (
                f"blocks are not the identity (they change their input by {min(changes):.2g} to {max(changes):.2g} of its size)"
            )
        paths = brief(self.collapse((block.path for block in identical), (block.path for block in self.blocks)))
        return f"{len(identical)} of {len(self.blocks)} blocks are the identity ({paths})"

    def _about_output(self) -> str:
        loss = "loss" if self.was_trained else "initial loss"
        layer = f"output projection ({self.output_layer.path})" if self.output_layer else "output"
        instead = "" if self.output.zero_loss is None else f" instead of {self.output.zero_loss:.2f}"
        if self.output.zero:
            return f"{layer} is zero: the output is exactly zero, {loss} {self.output.loss:.2f}"
        if self.output.constant:
            where = f" ({self.output_layer.path})" if self.output_layer else ""
            return f"the output is constant but not zero{where}: {loss} {self.output.loss:.2f}{instead}"
        state = self.state_now(self.output_layer.state if self.output_layer else "random")
        return f"{layer} is {state}: {loss} {self.output.loss:.2f}{instead}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Tables of the findings, under the verdict."""
        yield from printed(self)
