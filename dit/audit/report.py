"""What an audit found: the findings, the verdict in words, and how both are printed."""

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
"""States in words, where the name of a state does not say enough."""


class AuditFinding(BaseModel):
    """One thing that an audit found; a plain record."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")


class Output(AuditFinding):
    """The first output: its root mean square, its loss, and the loss of a zero output (None if it cannot be known).

    `path` says where the output is in what the network returns; it is empty if the network returns only this tensor.
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
    """A block of the network. `change` is RMS(output - input) / RMS(input), the largest value of all its streams."""

    path: str
    kind: str
    change: float
    identity: bool


class Input(AuditFinding):
    """An input, and how much the output changes, relative to its size, if samples exchange it; None if they cannot."""

    name: str
    part: Part
    shape: tuple[int, ...]
    dtype: str
    at_start: float | None
    after_steps: float | None


class Layer(AuditFinding):
    """A layer of modulation, or the output projection: how it starts, and which inputs it depends on."""

    path: str
    place: Place
    state: State
    zero_rows: str
    driven_by: tuple[str, ...]


class Wake(AuditFinding):
    """Rows of a tensor (all rows, if `rows` is empty), and the step, counted from 0, of their first gradient.

    If they had no gradient, `step` is None, and `reason` says why: `unused` (the tensor is not in the graph of the loss),
    `rounding` (only rounding errors, as for the bias of attention keys, which softmax ignores), or `zero`.
    """

    tensor: str
    rows: str
    step: int | None
    reason: Literal["unused", "rounding", "zero"] | None


class Units(AuditFinding):
    """Units of a layer (rows of its weight, with their biases) that start equal.

    `still_equal` counts those that moved, and moved alike, which is a symmetry. `unmoved` counts those that did not move;
    nothing can be said about them. `period` is the distance between equal rows, if it is regular, as for equal attention heads.
    """

    layer: str
    units: int
    distinct: int
    still_equal: int
    unmoved: int
    period: int | None


class TensorValues(AuditFinding):
    """A tensor whose entries all have the same value."""

    tensor: str
    value: float


class Doubt(AuditFinding):
    """Why one kind of finding is not certain, so that the audit concludes nothing from it."""

    about: Topic
    reason: str


class Trained(AuditFinding):
    """How many matrices could be judged by their statistics, and how many of them no usual initialisation would draw."""

    matrices: int
    moved: int
    likely: bool


class Source(AuditFinding):
    """Where weights were read: which tensors of which files were read, and which were ignored."""

    files: tuple[str, ...]
    holder: str
    """The keys that lead to the tensors in the file."""
    prefix: str
    """The prefix of their names in the file."""
    read: tuple[str, ...]
    """Names of the tensors that were read, in the network."""
    ignored: tuple[str, ...]
    """Names of the tensors that were ignored, in the file."""
    ignored_files: tuple[str, ...]
    ignored_settings: tuple[str, ...]
    """Keys of the configuration that the class does not accept."""


class AuditReport(AuditFinding):
    """Everything that `dit.audit.audit` found. `model_dump_json` writes it, and `model_validate_json` reads it again."""

    model: str
    parameters: int
    trainable: int
    precision: str
    steps: int
    samples: int
    """How many samples the batch has."""
    repeated: tuple[str, ...]
    """Lists of blocks that are alike. In names of their tensors, `*` stands for the index of the block."""
    output: Output
    output_layer: Layer | None
    blocks: tuple[Block, ...]
    inputs: tuple[Input, ...]
    modulation: tuple[Layer, ...]
    wakes: tuple[Wake, ...]
    units: tuple[Units, ...]
    values: tuple[TensorValues, ...]
    gates: Gates | None
    """What makes the blocks the identity; None if they are not."""
    doubts: tuple[Doubt, ...]
    trained: Trained | None
    """None if no matrix is large enough to tell."""
    source: Source | None = None
    """None if weights were read from no file."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def verdict(self) -> str:
        """How the network starts, in words."""
        return plain(f"{self._name()}: {' '.join(capital(sentence) + '.' for sentence in self._sentences())}")

    def _name(self) -> str:
        if self.was_trained and self.output.finite:
            return "Trained"
        if not self.failures("adaln-zero"):
            return "adaLN-Zero"
        return "Not adaLN-Zero" if self.reasons("adaln-zero") else "Undecided"

    @property
    def was_trained(self) -> bool:
        """Whether the weights have the statistics of a trained network."""
        return self.trained is not None and self.trained.likely

    def failures(self, expectation: Expectation | str) -> list[str]:
        """The findings against an expectation, then what is undecided; empty if the network certainly meets it.

        Raises `ConfigError` for an unknown name.
        """
        return self.reasons(expectation) + self.reservations(expectation)

    def reasons(self, expectation: Expectation | str) -> list[str]:
        """The findings against an expectation, such as `adaln-zero`."""
        return [reason for check in EXPECTATIONS[known(expectation)] for reason in check(self)]

    def reservations(self, expectation: Expectation | str) -> list[str]:
        """What is undecided about an expectation, and why."""
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
        """Paths with `*` for the index of repeated blocks, and with a count if only some of the blocks `among` are meant."""
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
        """The tensors of some `wakes`, with their rows."""
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
        """A state in words; random weights of a trained network are called trained."""
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
