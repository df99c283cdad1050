"""What attention does: its logits and its entropy, from queries and keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOGITS_AT_ONCE = 2**24
"""Logits, 64 MiB of them, that are held at a time."""


@torch.no_grad()
def attention_statistics(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """The largest absolute logit, and the mean entropy in nats over samples, heads and queries, as scalars on the device.

    `queries` and `keys` (B, heads, T, K). A logit is q . k / sqrt(K), as softmax receives it. Logits grow ahead of the
    divergence of Dehghani et al. (2023), "Scaling vision transformers to 22 billion parameters", section 3.1; entropy falls
    ahead of that of Zhai et al. (2023), "Stabilizing transformer training by preventing attention entropy collapse".
    """
    batch, heads, tokens, width = queries.shape
    rows = max(1, LOGITS_AT_ONCE // (heads * tokens * tokens))
    largest, entropies = [], []
    with torch.autocast(queries.device.type, enabled=False):
        for some, others in zip(queries.float().split(rows), keys.float().split(rows), strict=True):
            logits = some @ others.transpose(2, 3) / math.sqrt(width)  # (rows, heads, T, T)
            largest.append(logits.abs().amax())
            log_weights = logits.log_softmax(dim=3)
            entropies.append(-(log_weights.exp() * log_weights).sum())
    return torch.stack(largest).amax(), torch.stack(entropies).sum() / (batch * heads * tokens)
