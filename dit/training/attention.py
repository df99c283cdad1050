"""Measures the logits and the entropy of every attention call of any network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

LOGITS_AT_ONCE = 2**24
"""Number of logits, 64 MiB in float32, that are held in memory at a time."""


class Attention(TorchFunctionMode):
    """Within the block, `read` receives the `statistics` of every call of `scaled_dot_product_attention`.

    So queries and keys are those of the softmax: normalised and rotated by position, if the network does this.
    """

    def __init__(self, read: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self.read = read

    def __torch_function__(
        self, function: Callable[..., Any], _types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call `function`. Within the block, torch calls this method in place of each of its functions."""
        given = kwargs or {}
        if function is F.scaled_dot_product_attention:
            query, key = (args[index] if len(args) > index else given[name] for index, name in enumerate(("query", "key")))
            self.read(*statistics(query, key, given.get("scale")))
        return function(*args, **given)


@torch.no_grad()
def statistics(queries: Tensor, keys: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """The largest absolute logit, and the mean entropy in nats over samples, heads and queries, as scalars on the device.

    `queries` (B, heads, T, K) and `keys` (B, heads, S, K); a logit is q . k times `scale`, by default 1 / sqrt(K), without any
    mask. Both may warn of divergence: logits grow before it in Dehghani et al. (2023), "Scaling vision transformers to 22
    billion parameters", section 3.1, and entropy falls before it in Zhai et al. (2023), "Stabilizing transformer training by
    preventing attention entropy collapse".
    """
    *batch, tokens, width = queries.shape
    rows = max(1, LOGITS_AT_ONCE // (math.prod(batch[1:]) * tokens * keys.shape[-2]))
    largest, entropies = [], []
    with torch.autocast(queries.device.type, enabled=False):
        for some, others in zip(queries.float().split(rows), keys.float().split(rows), strict=True):
            logits = some @ others.transpose(-2, -1) * (scale or 1 / math.sqrt(width))  # (rows, heads, T, S)
            largest.append(logits.abs().amax())
            log_weights = logits.log_softmax(dim=-1)
            entropies.append(-(log_weights.exp() * log_weights).sum())
    return torch.stack(largest).amax(), torch.stack(entropies).sum() / (math.prod(batch) * tokens)
