"""How the diffusion transformers of diffusers start, as a table in Markdown: `python -m dit.audit.atlas > docs/atlas.md`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dit.audit import audit
from dit.audit.report import AuditReport
from dit.audit.signatures import SIGNATURES
from dit.audit.targets import load
from dit.errors import UserError

ORIGINS = {
    "DiTTransformer2DModel": ("zero modulation and head", "facebookresearch/DiT, models.py, `initialize_weights`"),
    "HunyuanVideoTransformer3DModel": (
        "zero modulation",
        "Tencent-Hunyuan/HunyuanVideo, hyvideo/modules/modulate_layers.py, `ModulateDiT`",
    ),
    "PixArtTransformer2DModel": (
        "zero head and zero outputs of cross-attention",
        "PixArt-alpha/PixArt-alpha, diffusion/model/nets/PixArt.py, `initialize_weights`",
    ),
    "WanTransformer3DModel": ("zero head", "Wan-Video/Wan2.1, wan/modules/model.py, `init_weights`"),
}
"""What the original code makes zero, by class, and where."""

HEAD = """# Atlas: how the diffusion transformers of diffusers start

This page shows how the networks of the library diffusers start if you train them from scratch. It lists every network of
diffusers {version} that `dit audit` can call and that has "Transformer" in its name, and also HunyuanDiT2DModel and
UVit2DModel. We built each network by its constructor, at a small size (one to six blocks), and measured it. Most
constructors draw the weights by torch's defaults, because users usually load all weights from a checkpoint afterwards.

Networks that start differently from their original code come first, then networks with equal units, if there are any, then all
others. Within each of these groups, the highest initial loss comes first. The columns are:

- *output*: the root mean square (RMS) of the network's output before training, or "zero".
- *blocks*: how many blocks are the identity, that is, return their input unchanged.
- *block modulation*: how the modulation layers of the blocks start. These layers turn timestep and class into shifts, scales
  and gates, which [zero-init.md](zero-init.md) explains.
- *equal units*: how many units (rows of a weight matrix) start equal to another unit of their layer, and stay equal in
  training.
- *first gradients*: the first training step, counted from 0, in which a gradient arrives at the head (last layer), at the
  modulation layers, at the rest of the blocks, and at all other weights, in this order. "never" means not within four steps,
  and "-" means that the audit found no such layer.
- *loss*: the mean squared error before training. The target is noise with mean square 1, so an output of zero has a loss of 1.
- *original code*: what starts at zero in the original code, but not in diffusers, and where that code sets it to zero. We
  looked this up for four networks only.

[audit.md](audit.md) says how the audit finds all this. `python -m dit.audit.atlas > docs/atlas.md` makes this page.

| network | output | blocks | block modulation | equal units | first gradients | loss | original code |
|---|---|---|---|---|---|---|---|
"""


ADVICE = """`dit audit` cannot make inputs for these networks. To audit one, write a function that returns (model, batch), and
give `dit audit` its name as `package.module:function`.

"""


@dataclass(frozen=True)
class Entry:
    """One network: its row, and how much it surprises."""

    name: str
    row: str
    surprise: tuple[bool, bool, float]


def entry(name: str, report: AuditReport) -> Entry:
    """What an audit found, in a row."""
    identical = sum(block.identity for block in report.blocks)
    states = list(dict.fromkeys(layer.state for layer in report.modulation if layer.place != "final"))
    alike = sum(item.still_equal for item in report.units)
    zero, where = ORIGINS.get(name, ("", ""))
    differs = ("head" in zero and not report.output.zero) or ("modulation" in zero and "zero" not in states)
    cells = [
        name,
        "zero" if report.output.zero else f"RMS {report.output.rms:.2g}",
        f"{identical} of {len(report.blocks)} are the identity" if report.blocks else "none was found",
        ", ".join(states) or "none was found",
        str(alike) if alike else "none",
        ", ".join(_wakes(report)),
        f"{report.output.loss:.2f}",
        f"{zero} ({where})" if zero else "",
    ]
    return Entry(name, f"| {' | '.join(cells)} |", (differs, alike > 0, report.output.loss))


def _wakes(report: AuditReport) -> Iterator[str]:
    """The first step of the head's weights, of those of modulation, of the others of the blocks, and of all others."""
    head = (f"{report.output_layer.path}.",) if report.output_layer else ()
    modulation = tuple(f"{layer.path}." for layer in report.modulation)
    blocks = tuple(f"{block.path}." for block in report.blocks)
    seen: set[str] = set()
    for prefixes in (head, modulation, blocks, ("",)):
        members = [wake for wake in report.wakes if wake.tensor.startswith(prefixes) and wake.tensor not in seen]
        seen |= {wake.tensor for wake in members}
        first = min((wake.step for wake in members if wake.step is not None), default="never")
        yield str(first) if members else "-"


def page(names: Sequence[str]) -> str:
    """The table for these classes, and those that could not be called, with the reason."""
    entries, refused = [], []
    for name in names:
        try:
            target = load(f"diffusers:{name}", {})
            entries.append(entry(name, audit(target.model, target.batch)))
        except UserError as error:
            refused.append(refusal(name, str(error)))
        print(name, file=sys.stderr)
    return table(entries, refused)


def refusal(name: str, reason: str) -> str:
    """A line for a network that could not be called, without the advice that ends each of these messages."""
    return f"- {name}: {reason.partition('; write a function')[0]}"


def table(entries: Sequence[Entry], refused: Sequence[str]) -> str:
    """The page: the rows, what surprises first, and what could not be called."""
    import diffusers

    rows = "\n".join(item.row for item in sorted(entries, key=lambda item: (*item.surprise, item.name), reverse=True))
    left = "\n".join(refused) or "None."
    total = len(entries) + len(refused)
    head = HEAD.format(version=diffusers.__version__)
    return f"{head}{rows}\n\n## Not called ({len(refused)} of {total})\n\n{ADVICE}{left}\n"


def main() -> None:
    """Print the page."""
    import diffusers

    warnings.simplefilter("ignore")
    diffusers.logging.set_verbosity_error()
    names = {name for name in diffusers.__all__ if "Transformer" in name} | SIGNATURES.keys()
    print(page(sorted(names)), end="")


if __name__ == "__main__":
    main()
