"""A small diffusers transformer from its constructor's signature and a few given arguments, and inputs for its `forward`.

Both are conventions of diffusers, not facts about one network: widths follow from heads and their size, arguments are known by
their names, and of the layouts that a sample can have the first that the network takes is used.
"""

from __future__ import annotations

import inspect
import itertools
import math
import re
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

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
MAX_ATTEMPTS = 200
"""Combinations of input layouts that are tried."""

FILLED = {"in_channels": 4, "patch_size": 2, "sample_size": SIDE * 2}
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
"""What the width of the text is called, in the order in which the names are believed."""


def small_config(constructor: type[nn.Module], given: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's arguments: those `given`, and small values for the rest. Raises `ConfigError` for an unknown name."""
    parameters = {name: item for name, item in inspect.signature(constructor).parameters.items() if item.kind != item.VAR_KEYWORD}
    given = {name: value for name, value in given.items() if not name.startswith("_")}
    unknown = [name for name in given if name not in parameters]
    if unknown:
        raise ConfigError(f"{constructor.__name__} has no argument '{unknown[0]}'; accepted: {', '.join(parameters)}")
    defaults = {name: None if item.default is item.empty else item.default for name, item in parameters.items()}
    small = {name: _small(name, value) for name, value in defaults.items()}
    small |= _heads(defaults)
    small |= {name: value for name, value in FILLED.items() if name in defaults and defaults[name] is None}
    if "norm_num_groups" in defaults and defaults.get("in_channels", 0) is None:
        small["in_channels"] = defaults["norm_num_groups"]
    small |= {name: small["num_attention_heads"] for name in ("num_kv_heads",) if name in small and small[name] is None}
    small |= given
    old, new = _width(defaults), _new_width(defaults, small, given)
    if old and new:
        for name, value in defaults.items():
            if name not in given and isinstance(value, int) and value >= old and value % old == 0 and not _is_heads(name):
                small[name] = value // old * new
    layers = min((value for name, value in small.items() if _is_layers(name) and isinstance(value, int) and value), default=LAYERS)
    for name, value in defaults.items():
        if name not in given and isinstance(value, list | tuple) and re.search(r"layers$|layer_ids$", name) and value:
            small[name] = type(value)(item for item in value if item < layers) or type(value)([0])
    return small


def _is_heads(name: str) -> bool:
    return bool(re.search(r"(^|_)n?heads$", name))


def _is_layers(name: str) -> bool:
    return bool(re.fullmatch(r"(n|num)_?(\w+_)?(layers|blocks)|(\w+_)?depth", name)) and "text_layers" not in name


def _small(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if _is_layers(name):
        return min(value, LAYERS)
    if name.startswith("sample_"):
        return min(value, SIDE * 2)
    if name == "num_embeds_ada_norm":
        return CLASSES
    if name == "pos_embed_max_size":
        return min(value, 4 * SIDE)
    sized = re.search(r"dim|size|channels|features", name) and not re.search(r"max|vocab|batch|rope|fourier|codebook|time_step", name)
    return SMALL_WIDTH if sized and value > LARGE else value


def _heads(defaults: Mapping[str, Any]) -> dict[str, int]:
    """Numbers of attention heads, all divided by one number, so that what follows from several of them still agrees."""
    heads = {name: value for name, value in defaults.items() if _is_heads(name) and isinstance(value, int)}
    if not heads:
        return {}
    common = math.gcd(*heads.values())
    queries = min(value for name, value in heads.items() if "kv" not in name and "key_value" not in name)
    factor = next((factor for factor in range(1, common + 1) if common % factor == 0 and queries // common * factor > 1), common)
    return {name: value // common * factor for name, value in heads.items()}


HEADS = ("num_attention_heads", "num_heads", "n_heads", "nheads", "dit_heads")
AXES = ("axes_dims", "axes_dims_rope", "rope_axes_dim", "axes_dim_rope", "rope_dim_list")


def _width(config: Mapping[str, Any]) -> int | None:
    """Heads times their size where both are arguments; otherwise what is called the width."""
    heads = next((config[name] for name in HEADS if config.get(name)), None)
    size = config.get("attention_head_dim") or config.get("head_dim")
    if heads and size:
        return heads * size
    return next((config[name] for name in WIDTH_NAMES if isinstance(config.get(name), int)), None)


def _new_width(defaults: Mapping[str, Any], small: Mapping[str, Any], given: Mapping[str, Any]) -> int | None:
    """The width that keeps the size of a head, which position embeddings depend on."""
    if any(name in given for name in WIDTH_NAMES) or small.get("attention_head_dim") or small.get("head_dim"):
        return _width(small)
    old = _width(defaults)
    heads = next((name for name in HEADS if name in defaults), None)
    if old and heads and old % defaults[heads] == 0:
        return old // defaults[heads] * small[heads]
    axes = next((small[name] for name in AXES if small.get(name)), None)
    return 2 * sum(axes) if axes else _width(small)


def inputs(model: nn.Module, config: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments that `model` can be called with. Raises `ConfigError`, naming what is missing, where none are found."""
    name = type(model).__name__
    candidates: dict[str, list[Any]] = {}
    parameters = inspect.signature(model.forward).parameters
    for argument, item in parameters.items():
        required = item.default is item.empty and item.kind not in (item.VAR_KEYWORD, item.VAR_POSITIONAL)
        candidates[argument] = _candidates(argument, str(item.annotation), required, config)
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
            if reached > progress:  # an error from deep inside tells more than one about a layout that cannot be right
                problem, progress = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", reached
        else:
            return {argument: chosen[argument] for argument in names if argument in chosen}
    raise ConfigError(f"no inputs were found that {name} takes ({problem}); {FACTORY}")


FACTORY = "write a function that returns (model, batch) and audit it as package.module:function"


def _candidates(argument: str, annotation: str, required: bool, config: Mapping[str, Any]) -> list[Any]:
    """Values that the argument may take, the likeliest first; none where it is left out or unknown."""
    draws = generator("audit", "synthesis", argument)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draws)

    def whole(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=draws)

    if argument in ("hidden_states", "x"):
        layouts = list(_layouts(config))
        found: list[Any] = [normal(*shape) for shape in layouts]
        return [list(tensor) for tensor in found] if "list" in annotation else found
    if re.fullmatch(r"(\w+_)?(timesteps?|t|time)(_r)?", argument):
        if not required and argument not in ("timestep", "timesteps", "t"):
            return []
        steps = torch.tensor([100, 500, 900])
        return [steps, steps / 1000] if "Long" in annotation else [steps / 1000, steps]
    if argument == "guidance":
        return [normal(BATCH).abs()] if config.get("guidance_embeds") else []
    if argument in ("class_labels",):
        return [whole(CLASSES, BATCH)] if config.get("num_embeds_ada_norm") else []
    if argument in ("encoder_hidden_states", "cap_feats", "text_bth", "encoder_hidden_states_t5", "encoder_hidden_states_2"):
        widths = [_text_width(argument, config)] if argument[-2:] in ("t5", "_2") else _text_widths(config)
        texts: list[Any] = [normal(BATCH, TEXT, width) for width in widths if width]
        return [list(text) for text in texts] if "list" in annotation else texts
    if argument in ("pooled_projections", "pooled_embeds", "proj_embedding", "global_hidden_states"):
        width = next(
            (
                config[name]
                for name in ("pooled_projection_dim", "in_text_dim2", "text_emb_dim", "global_states_input_dim", "global_cond_dim")
                if config.get(name)
            ),
            config.get("embedding_dim"),
        )
        return [normal(BATCH, width), normal(BATCH, 1, width)] if width else []
    if argument in ("img_ids", "txt_ids"):
        count = SIDE * SIDE if argument == "img_ids" else TEXT
        axes = config.get("axes_dims_rope") or (0, 0, 0)
        ids = torch.zeros(count, len(axes))
        if argument == "img_ids":
            ids[:, 1], ids[:, 2] = torch.arange(count) // SIDE, torch.arange(count) % SIDE
        return [ids, ids.expand(BATCH, -1, -1)] if required or "dims_rope" in " ".join(config) else []
    if "mask" in argument and (required or argument.startswith(("encoder_attention_mask", "encoder_hidden_states_mask", "text_emb"))):
        mask = torch.ones(BATCH, TEXT)
        return [mask.bool(), mask.long()] if required else [None, mask.bool(), mask.long()]
    if argument == "padding_mask":
        return [torch.zeros(1, 1, _side(config), _side(config))] if config.get("concat_padding_mask") else []
    if argument in ("img_shapes",):
        return [[[(1, SIDE, SIDE)]] * BATCH, (1, SIDE, SIDE), [(1, SIDE, SIDE)] * BATCH]
    if argument in ("original_size", "target_size", "crop_coords"):
        return [torch.full((BATCH, 2), float(8 * _side(config)))]
    if argument in ("num_frames", "height", "width"):
        return [{"num_frames": 1}.get(argument, SIDE)]
    if argument == "text_lens":
        return [torch.full((BATCH,), TEXT)]
    if argument == "visual_rope_pos":
        return [tuple(torch.arange(count) for count in (FRAMES, SIDE, SIDE))]
    if argument == "text_rope_pos":
        return [torch.arange(TEXT)]
    if argument == "image_embeds":
        width = config.get("image_embed_dim") or config.get("image_proj_dim")
        return [normal(BATCH, TEXT, width)] if width and required else [None]
    if argument == "image_rotary_emb" and required:
        from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

        return [get_2d_rotary_pos_embed_lumina(config["hidden_size"] // config["num_attention_heads"], SIDE, SIDE)]
    if argument == "added_cond_kwargs":
        return [{"resolution": None, "aspect_ratio": None}]
    return []


def _side(config: Mapping[str, Any]) -> int:
    patch = config.get("patch_size") or 1
    return SIDE * (patch if isinstance(patch, int) else patch[-1])


def _channels(config: Mapping[str, Any]) -> list[int]:
    names = ("in_channels", "in_visual_dim", "latent_channels", "io_channels", "latent_dim", "embedding_dim")
    return list(dict.fromkeys(config[name] for name in names if config.get(name)))


def _layouts(config: Mapping[str, Any]) -> Iterator[tuple[int, ...]]:
    """Shapes of the sample: a picture, tokens, a film with channels or frames first or channels last, a sequence, an embedding."""
    side = _side(config)
    for channels in _channels(config):
        yield BATCH, channels, side, side
        yield BATCH, SIDE * SIDE, channels
        yield BATCH, channels, FRAMES, side, side
        yield BATCH, FRAMES, channels, side, side
        yield BATCH, FRAMES, side, side, channels
        yield BATCH, channels, SIDE * SIDE
        yield BATCH, channels


def _text_widths(config: Mapping[str, Any]) -> list[int]:
    found = [config[name] for name in TEXT_NAMES if isinstance(config.get(name), int)]
    return list(dict.fromkeys([*found, *([width] if (width := _width(config)) else [])]))


def _text_width(argument: str, config: Mapping[str, Any]) -> int | None:
    names = ("cross_attention_dim_t5", "text_embed_dim_t5") if argument.endswith("t5") else ("text_embed_2_dim",)
    return next((config[name] for name in names if config.get(name)), None)
