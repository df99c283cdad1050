"""What an audit found: the findings, what they amount to in words, and how they are printed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, computed_field
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from dit.audit.expectations import EXPECTATIONS, Expectation, asleep, known, symmetric
from dit.audit.words import brief, capital, grouped, new_table, percent, span, without_effect

Part = Literal["sample", "timestep", "label", "text", "other"]
State = Literal["zero", "zero weight", "partly zero", "constant", "random"]
STATES: dict[State, str] = {"zero weight": "the same for every input (zero weight, but not bias)"}
"""In words, where the state itself is none."""


class AuditFinding(BaseModel):
    """One thing that an audit found; a plain record."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")


class Output(AuditFinding):
    """The first output: root mean square, loss, and the loss of an output that is zero (None where it cannot be known)."""

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
    place: Literal["block", "shared", "final"]
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

    @computed_field  # type: ignore[prop-decorator]
    @property
    def verdict(self) -> str:
        """What the network is at start, in words."""
        name = "adaLN-Zero" if not self.failures("adaln-zero") else "Not adaLN-Zero"
        return f"{name}: {' '.join(capital(sentence) + '.' for sentence in self._sentences())}"

    def failures(self, expectation: Expectation | str) -> list[str]:
        """Why the network is not what is expected; empty where it is. Raises `ConfigError` for an unknown name."""
        return [reason for check in EXPECTATIONS[known(expectation)] for reason in check(self)]

    def expect(self, expectation: Expectation | str) -> None:
        """For a test: raise `AssertionError` with the reasons and the verdict where the network is something else."""
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
            for name in self._with_both((wake.tensor for wake in alike), every)
        ]

    def _pattern(self, name: str) -> str:
        for path in self.repeated:
            name = re.sub(rf"^{re.escape(path)}\.\d+(?=\.|$)" if path else r"^\d+(?=\.|$)", f"{path}.*".lstrip("."), name)
        return name

    def _sentences(self) -> Iterator[str]:
        if not self.output.finite:
            yield "the output is not finite"
            return
        yield self._about_blocks()
        for place, words in (("block", "block modulation"), ("shared", "shared modulation"), ("final", "final modulation")):
            layers = [layer for layer in self.modulation if layer.place == place]
            for state, members in grouped(layers, lambda layer: (layer.state, layer.zero_rows)):
                paths = brief(self.collapse((layer.path for layer in members), (layer.path for layer in layers)))
                yield f"{words} is {STATES.get(state[0], ' '.join(state).strip())} at start ({paths})"
        yield self._about_output()
        still = [item.name for item in self.inputs if without_effect(item.after_steps)]
        if still:
            yield f"still without effect on the output after {self.steps} steps: {', '.join(still)}"
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
        layer = f"output projection ({self.output_layer.path})" if self.output_layer else "output"
        instead = "" if self.output.zero_loss is None else f" instead of {self.output.zero_loss:.2f}"
        if self.output.zero:
            return f"{layer} is zero: the output is exactly zero, initial loss {self.output.loss:.2f}"
        if self.output.constant:
            where = f" ({self.output_layer.path})" if self.output_layer else ""
            return f"the output is constant but not zero{where}: initial loss {self.output.loss:.2f}{instead}"
        state = self.output_layer.state if self.output_layer else "random"
        return f"{layer} is {state}: initial loss {self.output.loss:.2f}{instead}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Tables of the findings, under the verdict."""
        yield Text(self.verdict, style="bold")
        yield Text(
            f"\n{self.model}: {self.parameters:,} weights, {self.trainable:,} trainable; measured in {self.precision}; "
            f"output {' x '.join(map(str, self.output.shape))}, RMS {self.output.rms:.3g}"
        )
        if self.blocks:
            yield self._block_table()
        if self.modulation:
            yield self._modulation_table()
        yield self._input_table()
        if self.wakes:
            yield self._wake_table()
        if self.units:
            yield self._unit_table()
        if self.values:
            yield self._value_table()

    def _block_table(self) -> Table:
        table = new_table("Blocks", "block", "class", "relative change>")
        every = [block.path for block in self.blocks]
        for (kind, identity), members in grouped(self.blocks, lambda block: (block.kind, block.identity)):
            paths = "\n".join(self.collapse((block.path for block in members), every))
            table.add_row(paths, kind, "identity" if identity else span(members))
        return table

    def _modulation_table(self) -> Table:
        table = new_table("Modulation", "layer", "place", "at start", "driven by")
        every = [layer.path for layer in self.modulation]
        for (place, state, rows, drivers), members in grouped(
            self.modulation, lambda layer: (layer.place, layer.state, layer.zero_rows, layer.driven_by)
        ):
            paths = "\n".join(self.collapse((layer.path for layer in members), every))
            table.add_row(paths, place, f"{state} {rows}".strip(), ", ".join(drivers))
        return table

    def _input_table(self) -> Table:
        table = new_table(
            "Effect of each input on the output", "input", "probably", "shape", "at start>", f"after {self.steps} steps>"
        )
        for item in self.inputs:
            effects = [percent(item.at_start), percent(item.after_steps)]
            table.add_row(item.name, item.part, " x ".join(map(str, item.shape)), *effects)
        return table

    def _wake_table(self) -> Table:
        table = new_table("First gradient", "step>", "tensors", "how many>")
        reasons = {"unused": "unused", "rounding": "rounding", "zero": "never", None: ""}
        for (step, reason), members in sorted(
            grouped(self.wakes, lambda wake: (wake.step, wake.reason)), key=lambda item: (item[0][0] is None, item[0][0] or 0)
        ):
            table.add_row(reasons[reason] or str(step), "\n".join(self.tensors(members)), str(len(members)))
        return table

    def _with_both(self, names: Iterable[str], among: Iterable[str]) -> list[str]:
        """Collapsed names, with a weight and its bias on one line."""
        collapsed = self.collapse(names, among)
        merged = []
        for name in collapsed:
            stem, dot, kind = name.rpartition(".")
            if kind == "bias" and f"{stem}.weight" in collapsed:
                continue
            merged.append(f"{stem}{dot}{{weight,bias}}" if kind == "weight" and f"{stem}.bias" in collapsed else name)
        return merged

    def _unit_table(self) -> Table:
        title = f"Layers with units that start equal, and how many still repeat another after {self.steps} steps"
        table = new_table(title, "layer", "units>", "distinct>", "repeat>", "not moved>", "every>")
        every = [item.layer for item in self.units]
        for key, members in grouped(
            self.units, lambda item: (item.units, item.distinct, item.still_equal, item.unmoved, item.period)
        ):
            paths = "\n".join(self.collapse((item.layer for item in members), every))
            table.add_row(paths, *("" if value is None else str(value) for value in key))
        return table

    def _value_table(self) -> Table:
        table = new_table("Tensors with one value", "value>", "tensors", "how many>")
        every = [item.tensor for item in self.values]
        for value, members in grouped(self.values, lambda item: item.value):
            table.add_row(f"{value:g}", "\n".join(self._with_both((item.tensor for item in members), every)), str(len(members)))
        return table
