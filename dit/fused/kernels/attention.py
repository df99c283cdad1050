"""Attention: forward where sequences are short or results must repeat, and else cuDNN's; backward always."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit.fused.kernels.sums import add_rows, divisor, is_hopper


@triton.jit
def _tile(pointer, rows, stride, FIRST: tl.constexpr, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """Columns FIRST to FIRST + COUNT, zero from SIZE on, of `rows` of a matrix."""
    columns = FIRST + tl.arange(0, COUNT)
    at = pointer + rows[:, None] * stride + columns[None, :]
    if FIRST + COUNT <= SIZE:
        return tl.load(at)
    return tl.load(at, columns[None, :] < SIZE, 0.0)


@triton.jit
def _put(pointer, rows, stride, total, value, FIRST: tl.constexpr, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """Store what `_tile` would load, and its sum over rows at `total`."""
    columns = FIRST + tl.arange(0, COUNT)
    inside = columns < SIZE
    at = pointer + rows[:, None] * stride + columns[None, :]
    tl.store(at, value.to(pointer.dtype.element_ty), inside[None, :])
    tl.store(total + columns, tl.sum(value, 0), inside)


LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _attention_forward(
    qkv, out, lse, heads, scale, TOKENS: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
    OWN: tl.constexpr, OTHER: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: OWN queries of one head of one sample, with a running maximum; Dao et al. (2022), algorithm 1."""
    pair, block = tl.program_id(0) // (TOKENS // OWN), tl.program_id(0) % (TOKENS // OWN)
    width = heads * SIZE
    sample, head = (pair // heads).to(tl.int64), pair % heads
    q = qkv + sample * TOKENS * 3 * width + head * SIZE
    k, v = q + width, q + 2 * width
    own = block * OWN + tl.arange(0, OWN)
    q1 = _tile(q, own, 3 * width, 0, WIDE, SIZE)
    o1 = tl.zeros([OWN, WIDE], tl.float32)
    if REST > 0:
        q2 = _tile(q, own, 3 * width, WIDE, REST, SIZE)
        o2 = tl.zeros([OWN, REST], tl.float32)
    highest = tl.full([OWN], float("-inf"), tl.float32)
    total = tl.zeros([OWN], tl.float32)
    for start in tl.range(0, TOKENS, OTHER, num_stages=STAGES):
        rows = start + tl.arange(0, OTHER)
        s = tl.dot(q1, tl.trans(_tile(k, rows, 3 * width, 0, WIDE, SIZE)))
        if REST > 0:
            s = tl.dot(q2, tl.trans(_tile(k, rows, 3 * width, WIDE, REST, SIZE)), s)
        s *= scale * LOG2_E
        higher = tl.maximum(highest, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(p, 1)
        highest = higher
        o1 = tl.dot(p.to(q1.dtype), _tile(v, rows, 3 * width, 0, WIDE, SIZE), o1 * shrink[:, None])
        if REST > 0:
            o2 = tl.dot(p.to(q1.dtype), _tile(v, rows, 3 * width, WIDE, REST, SIZE), o2 * shrink[:, None])
    tl.store(lse + pair * TOKENS + own, (highest + tl.log2(total)) / LOG2_E)
    at = out + sample * TOKENS * width + head * SIZE + own[:, None] * width
    columns = tl.arange(0, WIDE)[None, :]
    tl.store(at + columns, (o1 / total[:, None]).to(out.dtype.element_ty), columns < SIZE)
    if REST > 0:
        columns = WIDE + tl.arange(0, REST)[None, :]
        tl.store(at + columns, (o2 / total[:, None]).to(out.dtype.element_ty), columns < SIZE)


@triton.jit
def _attention_delta(
    out, dout, delta, heads, TOKENS: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr, OWN: tl.constexpr
):
    """One program: the sums of `out * dout` over the channels of one head, for OWN tokens of one sample."""
    pair, block = tl.program_id(0) // (TOKENS // OWN), tl.program_id(0) % (TOKENS // OWN)
    width = heads * SIZE
    offset = (pair // heads).to(tl.int64) * TOKENS * width + pair % heads * SIZE
    own = block * OWN + tl.arange(0, OWN)
    product = _tile(out + offset, own, width, 0, WIDE, SIZE).to(tl.float32) * _tile(dout + offset, own, width, 0, WIDE, SIZE)
    total = tl.sum(product, 1)
    if REST > 0:
        rest = _tile(out + offset, own, width, WIDE, REST, SIZE).to(tl.float32)
        total += tl.sum(rest * _tile(dout + offset, own, width, WIDE, REST, SIZE), 1)
    tl.store(delta + pair * TOKENS + own, total)


@triton.jit
def _attention_backward(
    qkv, dout, lse, delta, dqkv, partial, heads, scale, TOKENS: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr,
    REST: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: the gradients of OWN keys and values, then of OWN queries, of one head of one sample.

    The probabilities are computed twice from `lse`, so that nothing is summed between programs; Dao et al. (2022), appendix
    B.2. A head of SIZE channels is cut in WIDE and REST ones, powers of two. `partial` gets the sums over OWN tokens,
    (B * blocks, 3D).
    """
    blocks = TOKENS // OWN
    pair, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    width = heads * SIZE
    sample, head = (pair // heads).to(tl.int64), pair % heads
    q = qkv + sample * TOKENS * 3 * width + head * SIZE
    k, v = q + width, q + 2 * width
    dq = dqkv + sample * TOKENS * 3 * width + head * SIZE
    do = dout + sample * TOKENS * width + head * SIZE
    sums = partial + (sample * blocks + block) * 3 * width + head * SIZE
    lse += pair * TOKENS
    delta += pair * TOKENS
    own = block * OWN + tl.arange(0, OWN)

    k1 = _tile(k, own, 3 * width, 0, WIDE, SIZE)
    v1 = _tile(v, own, 3 * width, 0, WIDE, SIZE)
    dk1 = tl.zeros([OWN, WIDE], tl.float32)
    dv1 = tl.zeros([OWN, WIDE], tl.float32)
    if REST > 0:
        k2 = _tile(k, own, 3 * width, WIDE, REST, SIZE)
        v2 = _tile(v, own, 3 * width, WIDE, REST, SIZE)
        dk2 = tl.zeros([OWN, REST], tl.float32)
        dv2 = tl.zeros([OWN, REST], tl.float32)
    for start in tl.range(0, TOKENS, OTHER, num_stages=STAGES):
        rows = start + tl.arange(0, OTHER)
        q1 = _tile(q, rows, 3 * width, 0, WIDE, SIZE)
        g1 = _tile(do, rows, width, 0, WIDE, SIZE)
        s = tl.dot(k1, tl.trans(q1))
        dp = tl.dot(v1, tl.trans(g1))
        if REST > 0:
            q2 = _tile(q, rows, 3 * width, WIDE, REST, SIZE)
            g2 = _tile(do, rows, width, WIDE, REST, SIZE)
            s = tl.dot(k2, tl.trans(q2), s)
            dp = tl.dot(v2, tl.trans(g2), dp)
        p = tl.exp2(s * (scale * LOG2_E) - (tl.load(lse + rows) * LOG2_E)[None, :])
        ds = (p * (dp - tl.load(delta + rows)[None, :])).to(q1.dtype)
        p = p.to(q1.dtype)
        dv1 = tl.dot(p, g1, dv1)
        dk1 = tl.dot(ds, q1, dk1)
        if REST > 0:
            dv2 = tl.dot(p, g2, dv2)
            dk2 = tl.dot(ds, q2, dk2)
    _put(dq + width, own, 3 * width, sums + width, dk1 * scale, 0, WIDE, SIZE)
    _put(dq + 2 * width, own, 3 * width, sums + 2 * width, dv1, 0, WIDE, SIZE)
    if REST > 0:
        _put(dq + width, own, 3 * width, sums + width, dk2 * scale, WIDE, REST, SIZE)
        _put(dq + 2 * width, own, 3 * width, sums + 2 * width, dv2, WIDE, REST, SIZE)

    q1 = _tile(q, own, 3 * width, 0, WIDE, SIZE)
    g1 = _tile(do, own, width, 0, WIDE, SIZE)
    dq1 = tl.zeros([OWN, WIDE], tl.float32)
    if REST > 0:
        q2 = _tile(q, own, 3 * width, WIDE, REST, SIZE)
        g2 = _tile(do, own, width, WIDE, REST, SIZE)
        dq2 = tl.zeros([OWN, REST], tl.float32)
    own_lse = tl.load(lse + own) * LOG2_E
    own_delta = tl.load(delta + own)
    for start in tl.range(0, TOKENS, OTHER, num_stages=STAGES):
        rows = start + tl.arange(0, OTHER)
        key1 = _tile(k, rows, 3 * width, 0, WIDE, SIZE)
        score = tl.dot(q1, tl.trans(key1))
        dprob = tl.dot(g1, tl.trans(_tile(v, rows, 3 * width, 0, WIDE, SIZE)))
        if REST > 0:
            key2 = _tile(k, rows, 3 * width, WIDE, REST, SIZE)
            score = tl.dot(q2, tl.trans(key2), score)
            dprob = tl.dot(g2, tl.trans(_tile(v, rows, 3 * width, WIDE, REST, SIZE)), dprob)
        prob = tl.exp2(score * (scale * LOG2_E) - own_lse[:, None])
        ds = (prob * (dprob - own_delta[:, None])).to(q1.dtype)
        dq1 = tl.dot(ds, key1, dq1)
        if REST > 0:
            dq2 = tl.dot(ds, key2, dq2)
    _put(dq, own, 3 * width, sums, dq1 * scale, 0, WIDE, SIZE)
    if REST > 0:
        _put(dq, own, 3 * width, sums, dq2 * scale, WIDE, REST, SIZE)


CUDNN_TOKENS = 128
"""From this length on, cuDNN's forward is the faster one; it promises no repeatable result."""

FORWARD = {"OWN": 64, "OTHER": 64, "STAGES": 3, "num_warps": 4}
BACKWARD = {"OWN": 64, "OTHER": 64, "STAGES": 3, "num_warps": 4}
"""Tokens of a program, tokens of one of its steps, and how it is run."""

EVEN_HEADS_ON_HOPPER = {"STAGES": 4}
"""2 % faster in the backward pass, in shared memory that other cards do not have."""


def _heads(qkv: Tensor, num_heads: int, settings: dict[str, int]) -> dict[str, int]:
    """Compile-time arguments for heads whose size need not be a power of two."""
    tokens, size = qkv.shape[1], qkv.shape[2] // (3 * num_heads)
    wide = 1 << (size.bit_length() - 1)
    rest = max(16, triton.next_power_of_2(size - wide)) if size > wide else 0
    own, other = (divisor(tokens, settings[name]) for name in ("OWN", "OTHER"))
    shape = {"TOKENS": tokens, "SIZE": size, "WIDE": wide, "REST": rest}
    return {**settings, **shape, "OWN": own, "OTHER": other}


def attention(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """`operations.attention` between its matrix products: qkv (B, T, 3D) -> heads (B, T, D) and log-sum-exp (B, heads, T)."""
    batch, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    if tokens >= CUDNN_TOKENS and not torch.are_deterministic_algorithms_enabled():
        q, k, v = qkv.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, T, D / heads)
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
        return out.transpose(1, 2).flatten(2), lse
    sizes = _heads(qkv, num_heads, FORWARD)
    out = qkv.new_empty((batch, tokens, width))
    lse = qkv.new_empty((batch, num_heads, tokens), dtype=torch.float32)
    grid = (batch * num_heads * (tokens // sizes["OWN"]),)
    _attention_forward[grid](qkv, out, lse, num_heads, sizes["SIZE"] ** -0.5, **sizes)
    return out, lse


def attention_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Gradient of qkv, (B, T, 3D), and its sum over all tokens, (3D,)."""
    batch, tokens, width = qkv.shape
    sizes = _heads(qkv, num_heads, BACKWARD)
    if not sizes["REST"] and is_hopper(qkv.device):
        sizes |= EVEN_HEADS_ON_HOPPER
    blocks = tokens // sizes["OWN"]
    dqkv = torch.empty_like(qkv)
    partial = qkv.new_empty((batch * blocks, width), dtype=torch.float32)
    grid = (batch * num_heads * blocks,)
    delta = torch.empty_like(lse)
    head = {name: sizes[name] for name in ("TOKENS", "SIZE", "WIDE", "REST", "OWN")}
    _attention_delta[grid](out, dout, delta, num_heads, **head, num_warps=4)
    _attention_backward[grid](qkv, dout, lse, delta, dqkv, partial, num_heads, sizes["SIZE"] ** -0.5, **sizes)
    return dqkv, add_rows(partial, qkv.dtype)
