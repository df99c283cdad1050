"""Build a small diffusers transformer from its constructor's signature and a few given arguments, and inputs for `forward`.

This uses conventions of diffusers, not facts about one network: widths follow from the number of heads and their size,
arguments are known by their names, and the layout of a sample is the first one that the network accepts.
"""

from __future__ import annotations

import inspect
import itertools
import math
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dit.audit.files import FACTORY
from dit.errors import ConfigError
from dit.seeding import generator

BATCH = 3
FRAMES = 5
SIDE = 4
"""Tokens along each side of the sample."""
TEXT = 7
CLASSES = 10
SMALL_WIDTH = 64
LARGE = 256
"""Widths above this are made small."""
LAYERS = 2
MAX_ATTEMPTS = 500
"""How many combinations of input layouts are tried at most."""

FILLED = {"in_channels": 4, "patch_size": 2, "sample_size": SIDE * 2, "caption_channels": SMALL_WIDTH}
"""Arguments whose default None stands for a value that a network needs."""

WIDTH_NAMES = ("hidden_size", "model_dim", "embed_dim", "token_dim", "dit_dim", "dim")
TEXT_NAMES = (
    "joint_attention_dim",
    "text_embed_dim",
    "caption_channels",
    "text_dim",
    "cross_attention_input_dim",
    "encoder_hidden_states_channels",
    "cross_attention_dim",
    "cap_feat_dim",
    "context_in_dim",
    "text_in_dim",
    "in_text_dim",
    "text_hidden_dim",
    "cond_token_dim",
    "dit_text_dim",
    "condition_dim",
    "embedding_dim",
    "encoder_hidden_size",
    "hidden_size",
)
"""Names of the argument for the width of the text, the most reliable first."""


def small_config(constructor: type[nn.Module], given: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's arguments: those `given`, and small values for the rest. Raises `ConfigError` for an unknown name."""
    parameters = {
        name: item for name, item in inspect.signature(constructor).parameters.items() if item.kind != item.VAR_KEYWORD
    }
    given = {name: value for name, value in given.items() if not name.startswith("_")}
    unknown = [name for name in given if name not in parameters]
    if unknown:
        raise ConfigError(f"{constructor.__name__} has no argument '{unknown[0]}'; expected one of {', '.join(parameters)}")
    defaults = {name: None if item.default is item.empty else item.default for name, item in parameters.items()}
    small = {name: _small(name, value) for name, value in defaults.items()} | _heads(defaults)
    small |= _needed(defaults, small) | given
    old, new = _width(defaults), _new_width(defaults, small, given)
    for name, value in defaults.items():
        if name in given:
            continue
        if old and new and isinstance(value, int) and value >= old and value % old == 0 and not _is_heads(name):
            small[name] = value // old * new
        if isinstance(value, list | tuple) and re.search(r"layers$|layer_ids$", name) and value:
            layers = min(
                small[other] for other in small if _is_layers(other) and isinstance(small[other], int) and small[other]
            )
            small[name] = type(value)(item for item in value if item < layers) or type(value)([0])
    return small


def _needed(defaults: Mapping[str, Any], small: Mapping[str, Any]) -> dict[str, Any]:
    """Values for arguments whose default is None, with which no network can be built."""
    missing = {name for name, value in defaults.items() if value is None}
    found: dict[str, Any] = {name: value for name, value in FILLED.items() if name in missing}
    if "in_channels" in missing and "norm_num_groups" in defaults:  # group norms are for images, without patches
        found |= {"in_channels": defaults["norm_num_groups"], "patch_size": None}
    if {"in_channels", "out_channels"} <= missing:
        found["out_channels"] = found["in_channels"]
    if "num_kv_heads" in missing:
        found["num_kv_heads"] = small["num_attention_heads"]
    return {name: value for name, value in found.items() if name in defaults}


def _is_heads(name: str) -> bool:
    return bool(re.search(r"(^|_)n?heads$", name))


def _is_layers(name: str) -> bool:
    return bool(re.fullmatch(r"(n|num)_?(\w+_)?(layers|blocks)|(\w+_)?depth", name)) and "text_layers" not in name


CAPS = {
    "sample_frames": 4 * FRAMES - 3,
    "sample_size": 2 * SIDE,
    "sample_width": 2 * SIDE,
    "sample_height": 2 * SIDE,
    "video_length": FRAMES,
    "num_embeds_ada_norm": CLASSES,
    "text_len": TEXT,
    "text_len_t5": TEXT,
    "max_text_seq_length": TEXT,
    "num_embeddings": TEXT,
    "pos_embed_max_size": 4 * SIDE,
}
"""The largest values of these arguments, so that they agree with the inputs."""


def _small(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if _is_layers(name):
        return min(value, LAYERS)
    if name in CAPS:
        return min(value, CAPS[name])
    sized = re.search(r"dim|size|channels|features", name)
    fixed = re.search(r"max|vocab|batch|rope|fourier|codebook|time_step", name)
    return SMALL_WIDTH if sized and not fixed and value > LARGE else value


def _heads(defaults: Mapping[str, Any]) -> dict[str, int]:
    """Small numbers of attention heads that keep their ratios, so that sizes that depend on several of them still agree."""
    heads = {name: value for name, value in defaults.items() if _is_heads(name) and isinstance(value, int)}
    if not heads:
        return {}
    common = math.gcd(*heads.values())
    queries = min(value for name, value in heads.items() if "kv" not in name and "key_value" not in name)
    factor = next(
        (factor for factor in range(1, common + 1) if common % factor == 0 and queries // common * factor > 1), common
    )
    return {name: value // common * factor for name, value in heads.items()}


HEADS = ("num_attention_heads", "num_heads", "n_heads", "nheads", "dit_heads")
AXES = ("axes_dims", "axes_dims_rope", "rope_axes_dim", "axes_dim_rope", "rope_dim_list")


def _width(config: Mapping[str, Any]) -> int | None:
    """Number of heads times their size if both are arguments; otherwise the argument that is called the width."""
    heads = next((config[name] for name in HEADS if config.get(name)), None)
    size = config.get("attention_head_dim") or config.get("head_dim")
    if heads and size:
        return heads * size
    return next((config[name] for name in WIDTH_NAMES if isinstance(config.get(name), int)), None)


def _new_width(defaults: Mapping[str, Any], small: Mapping[str, Any], given: Mapping[str, Any]) -> int | None:
    """The width with which a head keeps its size, because position embeddings depend on this size."""
    if any(name in given for name in WIDTH_NAMES) or small.get("attention_head_dim") or small.get("head_dim"):
        return _width(small)
    old = _width(defaults)
    heads = next((name for name in HEADS if name in defaults), None)
    if old and heads and old % defaults[heads] == 0:
        return old // defaults[heads] * small[heads]
    axes = next((small[name] for name in AXES if small.get(name)), None)
    return 2 * sum(axes) if axes else _width(small)


def inputs(model: nn.Module, config: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments that `model` accepts. Raises `ConfigError`, which names what is missing, if none are found."""
    name = type(model).__name__
    known, candidates = Inputs(config), dict[str, list[Any]]()
    parameters = inspect.signature(model.forward).parameters
    for argument, item in parameters.items():
        required = item.default is item.empty and item.kind not in (item.VAR_KEYWORD, item.VAR_POSITIONAL)
        candidates[argument] = known.candidates(Wanted(argument, str(item.annotation), required))
        if required and not candidates[argument]:
            raise ConfigError(f"no input is known for argument '{argument}' of {name}.forward; {FACTORY}")
    problem, progress = "", 0
    model.eval()
    names = [argument for argument, values in candidates.items() if values]
    orders = sorted(names, key=lambda argument: argument in ("hidden_states", "x"))
    for attempt in itertools.islice(itertools.product(*(candidates[argument] for argument in orders)), MAX_ATTEMPTS):
        chosen = {argument: value for argument, value in zip(orders, attempt, strict=True) if value is not None}
        try:
            with torch.no_grad():
                model(**{argument: chosen[argument] for argument in names if argument in chosen})
        except Exception as error:
            reached = len(list(traceback.walk_tb(error.__traceback__)))
            if reached > progress:  # an error from deep inside the network tells more than one about a wrong layout
                problem, progress = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", reached
        else:
            return {argument: chosen[argument] for argument in names if argument in chosen}
    raise ConfigError(f"no inputs were found that {name} takes ({problem}); {FACTORY}")


@dataclass(frozen=True)
class Wanted:
    """An argument of `forward`: its name, its annotation as text, and whether it has no default."""

    name: str
    annotation: str
    required: bool


class Inputs:
    """Makes candidates for the inputs of one network from the arguments of its constructor."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        patch = config.get("patch_size") or 1
        self.side = SIDE * (patch if isinstance(patch, int) else patch[-1])
        self.text = self.first("max_text_seq_length", "text_len", "num_embeddings") or TEXT
        self.frames = self.first("video_length") or FRAMES

    def candidates(self, wanted: Wanted) -> list[Any]:
        """Possible values of the argument, the likeliest first; None means to leave it out. Empty for an unknown argument."""
        for names, only_required, make in INPUTS:
            if re.fullmatch(names, wanted.name) and (wanted.required or not only_required):
                return make(self, wanted)
        return []

    def first(self, *names: str) -> Any:
        """The first of these constructor arguments that is set."""
        return next((self.config[name] for name in names if self.config.get(name)), None)

    def normal(self, *shape: int | None) -> list[Any]:
        """Normal noise of this shape as the only candidate; no candidate if a length is not known."""
        lengths = [length for length in shape if length is not None]
        return [torch.randn(lengths, generator=generator("audit", "normal", *lengths))] if len(lengths) == len(shape) else []

    def whole(self, high: int, *shape: int) -> list[Any]:
        """Whole numbers below `high`."""
        return [torch.randint(0, high, shape, generator=generator("audit", "whole", *shape))]


def _sample(known: Inputs, wanted: Wanted) -> list[Any]:
    found = [tensor for shape in _layouts(known) for tensor in known.normal(*shape)]
    return [list(tensor) for tensor in found] if "list" in wanted.annotation else found


def _layouts(known: Inputs) -> Iterator[tuple[int, ...]]:
    """Shapes of the sample: an image, tokens, a video with channels or frames first or channels last, a sequence, a vector."""
    names = ("in_channels", "in_visual_dim", "latent_channels", "io_channels", "latent_dim", "embedding_dim")
    for channels in dict.fromkeys(known.config[name] for name in names if known.config.get(name)):
        yield BATCH, channels, known.side, known.side
        yield BATCH, SIDE * SIDE, channels
        yield BATCH, channels, known.frames, known.side, known.side
        yield BATCH, known.frames, channels, known.side, known.side
        yield BATCH, known.frames, known.side, known.side, channels
        yield BATCH, channels, SIDE * SIDE
        yield BATCH, channels


def _timestep(known: Inputs, wanted: Wanted) -> list[Any]:
    steps = torch.tensor([100, 500, 900])
    fractions = steps / 1000
    by_frame = fractions[:, None].expand(-1, known.frames)
    return [steps, fractions, by_frame] if "Long" in wanted.annotation else [fractions, steps, by_frame]


def _text(known: Inputs, wanted: Wanted) -> list[Any]:
    widths = [*(known.config.get(name) for name in TEXT_NAMES), _width(known.config)]
    sizes = [width for width in dict.fromkeys(widths) if isinstance(width, int)]
    found = [text for width in sizes for text in known.normal(BATCH, known.text, width)]
    return [list(text) for text in found] if "list" in wanted.annotation else found


def _mask(known: Inputs, wanted: Wanted) -> list[Any]:
    mask = torch.ones(BATCH, known.text)
    return [*([] if wanted.required else [None]), mask.bool(), mask.long()]


def _positions(known: Inputs, wanted: Wanted) -> list[Any]:
    picture = wanted.name == "img_ids"
    ids = torch.zeros(SIDE * SIDE if picture else known.text, len(known.first("axes_dims_rope") or (0, 0, 0)))
    if picture:
        ids[:, 1], ids[:, 2] = torch.arange(len(ids)) // SIDE, torch.arange(len(ids)) % SIDE
    return [ids, ids.expand(BATCH, -1, -1)]


def _pooled(known: Inputs, wanted: Wanted) -> list[Any]:
    width = known.first(
        "pooled_projection_dim",
        "in_text_dim2",
        "text_emb_dim",
        "global_states_input_dim",
        "global_cond_dim",
        "embedding_dim",
    )
    return known.normal(BATCH, width) + known.normal(BATCH, 1, width)


def _guidance(known: Inputs, wanted: Wanted) -> list[Any]:
    return [value.abs() for value in known.normal(BATCH)] if known.first("guidance_embeds") else []


def _labels(known: Inputs, wanted: Wanted) -> list[Any]:
    classes = known.first("num_embeds_ada_norm")
    return [torch.arange(BATCH) % classes] if classes else []


def _image_tokens(known: Inputs, wanted: Wanted) -> list[Any]:
    found = known.normal(BATCH, TEXT, known.first("image_embed_dim", "image_proj_dim"))
    return found if wanted.required else [None, *found]


def _lumina_positions(known: Inputs, wanted: Wanted) -> list[Any]:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    return [get_2d_rotary_pos_embed_lumina(known.config["hidden_size"] // known.config["num_attention_heads"], SIDE, SIDE)]


INPUTS: list[tuple[str, bool, Callable[[Inputs, Wanted], list[Any]]]] = [
    (r"hidden_states|x", False, _sample),
    (r"timesteps?|t", False, _timestep),
    (r"\w*timesteps?(_r)?", True, _timestep),
    (r"encoder_hidden_states|cap_feats|text_bth", False, _text),
    (r"encoder_hidden_states_2", False, lambda known, _: known.normal(BATCH, known.text, known.first("text_embed_2_dim"))),
    (r"(encoder_attention_mask|encoder_hidden_states_mask)\w*", False, _mask),
    (r"(?!padding)\w*mask", True, _mask),
    (r"pooled_projections|pooled_embeds|proj_embedding|global_hidden_states", False, _pooled),
    (r"guidance", False, _guidance),
    (r"class_labels", False, _labels),
    (r"img_ids|txt_ids", False, _positions),
    (r"img_shapes", False, lambda *_: [[[(1, SIDE, SIDE)]] * BATCH, (1, SIDE, SIDE), [(1, SIDE, SIDE)] * BATCH]),
    (r"original_size|target_size|crop_coords", False, lambda known, _: [torch.full((BATCH, 2), 8.0 * known.side)]),
    (r"num_frames", False, lambda *_: [1]),
    (r"height|width", False, lambda *_: [SIDE]),
    (r"text_lens", False, lambda known, _: [torch.full((BATCH,), known.text)]),
    (r"visual_rope_pos", True, lambda known, _: [tuple(torch.arange(count) for count in (known.frames, SIDE, SIDE))]),
    (r"text_rope_pos", True, lambda known, _: [torch.arange(known.text)]),
    (r"image_embeds", False, _image_tokens),
    (r"image_rotary_emb", True, _lumina_positions),
    (
        r"control_hidden_states",
        False,
        lambda known, _: known.normal(BATCH, known.first("vace_in_channels"), known.frames, known.side, known.side),
    ),
    (r"prior_token_id", True, lambda known, _: known.whole(known.config["prior_vq_quantizer_codebook_size"], BATCH, SIDE**2)),
    (r"prior_token_drop", True, lambda *_: [torch.zeros(BATCH, SIDE**2, dtype=torch.bool)]),
    (r"cross_attention_kwargs", False, lambda *_: [None, {}]),
    (r"added_cond_kwargs", False, lambda *_: [{"resolution": None, "aspect_ratio": None}]),
]
"""Patterns of argument names, whether the argument is given only if `forward` requires it, and the function for candidates."""
