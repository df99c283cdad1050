"""Attention: its forward pass for short sequences (cuDNN computes longer ones), and its backward pass for all.

A head of SIZE channels is split into WIDE and REST channels, both powers of two, so REST may also cover channels of the next
head. When a program loads the tokens that it owns, it sets those channels to zero. On Hopper and later, it reads the tokens
that it walks through by descriptors of whole tensors, `wide` and `rest`. These do read channels of the next head, but the zeros
cancel them, or they are not stored. Other GPUs load tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dit.fused.kernels.sums import add_rows, divisor, has_tensor_copies


@triton.jit
def _tile(pointer, rows, stride, FIRST: tl.constexpr, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """Columns FIRST to FIRST + COUNT of `rows` of a matrix; columns from SIZE on are zero."""
    columns = FIRST + tl.arange(0, COUNT)
    at = pointer + rows[:, None] * stride + columns[None, :]
    if FIRST + COUNT <= SIZE:
        return tl.load(at)
    return tl.load(at, columns[None, :] < SIZE, 0.0)


@triton.jit
def _walk(
    described, tensor, row, channel, stride, ROWS: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr, SIZE: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """ROWS rows of `tensor` from `row` on; columns FIRST to FIRST + COUNT of the head that starts at `channel`."""
    if DESCRIBED:
        return described.load([row, channel + FIRST])
    return _tile(tensor + channel, row.to(tl.int64) + tl.arange(0, ROWS), stride, FIRST, COUNT, SIZE)


@triton.jit
def _put(pointer, rows, stride, total, value, FIRST: tl.constexpr, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """Store `value` where `_tile` would load it, and its sum over rows at `total`."""
    columns = FIRST + tl.arange(0, COUNT)
    inside = columns < SIZE
    at = pointer + rows[:, None] * stride + columns[None, :]
    tl.store(at, value.to(pointer.dtype.element_ty), inside[None, :])
    tl.store(total + columns, tl.sum(value, 0), inside)


LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _attention_forward(
    qkv, wide, rest, out, lse, heads, scale,
    TOKENS: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
    STAGES: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """One program: the output of OWN queries of one head and sample, with a running maximum; Dao et al. (2022), algorithm 1."""
    pair, block = tl.program_id(0) // (TOKENS // OWN), tl.program_id(0) % (TOKENS // OWN)
    width = heads * SIZE
    first, channel = pair // heads * TOKENS, pair % heads * SIZE
    q = qkv + first.to(tl.int64) * 3 * width + channel
    own = block * OWN + tl.arange(0, OWN)

    q1 = _tile(q, own, 3 * width, 0, WIDE, SIZE)
    o1 = tl.zeros([OWN, WIDE], tl.float32)
    if REST > 0:
        q2 = _tile(q, own, 3 * width, WIDE, REST, SIZE)
        o2 = tl.zeros([OWN, REST], tl.float32)
    highest = tl.full([OWN], float("-inf"), tl.float32)
    total = tl.zeros([OWN], tl.float32)
    for start in tl.range(0, TOKENS, OTHER, num_stages=STAGES):
        row = first + start
        s = tl.dot(q1, _walk(wide, qkv, row, width + channel, 3 * width, OTHER, 0, WIDE, SIZE, DESCRIBED).T)
        if REST > 0:
            s = tl.dot(q2, _walk(rest, qkv, row, width + channel, 3 * width, OTHER, WIDE, REST, SIZE, DESCRIBED).T, s)
        s *= scale * LOG2_E
        higher = tl.maximum(highest, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(p, 1)
        highest = higher
        v1 = _walk(wide, qkv, row, 2 * width + channel, 3 * width, OTHER, 0, WIDE, SIZE, DESCRIBED)
        o1 = tl.dot(p.to(q1.dtype), v1, o1 * shrink[:, None])
        if REST > 0:
            v2 = _walk(rest, qkv, row, 2 * width + channel, 3 * width, OTHER, WIDE, REST, SIZE, DESCRIBED)
            o2 = tl.dot(p.to(q1.dtype), v2, o2 * shrink[:, None])
    tl.store(lse + pair * TOKENS + own, (highest + tl.log2(total)) / LOG2_E)
    at = out + first.to(tl.int64) * width + channel + own[:, None] * width
    columns = tl.arange(0, WIDE)[None, :]
    tl.store(at + columns, (o1 / total[:, None]).to(out.dtype.element_ty), columns < SIZE)
    if REST > 0:
        columns = WIDE + tl.arange(0, REST)[None, :]
        tl.store(at + columns, (o2 / total[:, None]).to(out.dtype.element_ty), columns < SIZE)


@triton.jit
def _attention_backward_queries(
    qkv, wide, rest, out, dout, lse, delta, dqkv, partial, heads, scale,
    TOKENS: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
    STAGES: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """One program: the gradients of OWN queries of one head of one sample; Dao et al. (2022), appendix B.2.

    It writes the sums of `out * dout` over the channels of the head to `delta`, and the sums of the gradients over its OWN
    tokens to `partial`, one row of (B * blocks, 3D).
    """
    blocks = TOKENS // OWN
    pair, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    width = heads * SIZE
    first, channel = pair // heads * TOKENS, pair % heads * SIZE
    q = qkv + first.to(tl.int64) * 3 * width + channel
    dq = dqkv + first.to(tl.int64) * 3 * width + channel
    o = out + first.to(tl.int64) * width + channel
    do = dout + first.to(tl.int64) * width + channel
    sums = partial + (pair // heads * blocks + block) * 3 * width + channel
    own = block * OWN + tl.arange(0, OWN)

    q1 = _tile(q, own, 3 * width, 0, WIDE, SIZE)
    g1 = _tile(do, own, width, 0, WIDE, SIZE)
    own_delta = tl.sum(g1.to(tl.float32) * _tile(o, own, width, 0, WIDE, SIZE), 1)
    dq1 = tl.zeros([OWN, WIDE], tl.float32)
    if REST > 0:
        q2 = _tile(q, own, 3 * width, WIDE, REST, SIZE)
        g2 = _tile(do, own, width, WIDE, REST, SIZE)
        own_delta += tl.sum(g2.to(tl.float32) * _tile(o, own, width, WIDE, REST, SIZE), 1)
        dq2 = tl.zeros([OWN, REST], tl.float32)
    tl.store(delta + pair * TOKENS + own, own_delta)
    own_lse = tl.load(lse + pair * TOKENS + own) * LOG2_E
    for start in tl.range(0, TOKENS, OTHER, num_stages=STAGES):
        row = first + start
        k1 = _walk(wide, qkv, row, width + channel, 3 * width, OTHER, 0, WIDE, SIZE, DESCRIBED)
        s = tl.dot(q1, k1.T)
        dp = tl.dot(g1, _walk(wide, qkv, row, 2 * width + channel, 3 * width, OTHER, 0, WIDE, SIZE, DESCRIBED).T)
        if REST > 0:
            k2 = _walk(rest, qkv, row, width + channel, 3 * width, OTHER, WIDE, REST, SIZE, DESCRIBED)
            s = tl.dot(q2, k2.T, s)
            dp = tl.dot(g2, _walk(rest, qkv, row, 2 * width + channel, 3 * width, OTHER, WIDE, REST, SIZE, DESCRIBED).T, dp)
        p = tl.exp2(s * (scale * LOG2_E) - own_lse[:, None])
        ds = (p * (dp - own_delta[:, None])).to(q1.dtype)
        dq1 = tl.dot(ds, k1, dq1)
        if REST > 0:
            dq2 = tl.dot(ds, k2, dq2)
    _put(dq, own, 3 * width, sums, dq1 * scale, 0, WIDE, SIZE)
    if REST > 0:
        _put(dq, own, 3 * width, sums, dq2 * scale, WIDE, REST, SIZE)


@triton.jit
def _attention_backward_keys(
    qkv, wide, rest, dout, dout_wide, dout_rest, lse, delta, dqkv, partial, heads, scale,
    TOKENS: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
    STAGES: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """One program: the gradients of OWN keys and values of one head of one sample, and their sums, as for queries.

    It computes the probabilities again from `lse`, so programs do not have to add to each other's results.
    """
    blocks = TOKENS // OWN
    pair, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    width = heads * SIZE
    first, channel = pair // heads * TOKENS, pair % heads * SIZE
    k = qkv + first.to(tl.int64) * 3 * width + width + channel
    v = k + width
    dk = dqkv + first.to(tl.int64) * 3 * width + width + channel
    sums = partial + (pair // heads * blocks + block) * 3 * width + width + channel
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
        row, rows = first + start, start + tl.arange(0, OTHER)
        q1 = _walk(wide, qkv, row, channel, 3 * width, OTHER, 0, WIDE, SIZE, DESCRIBED)
        g1 = _walk(dout_wide, dout, row, channel, width, OTHER, 0, WIDE, SIZE, DESCRIBED)
        s = tl.dot(k1, q1.T)
        dp = tl.dot(v1, g1.T)
        if REST > 0:
            q2 = _walk(rest, qkv, row, channel, 3 * width, OTHER, WIDE, REST, SIZE, DESCRIBED)
            g2 = _walk(dout_rest, dout, row, channel, width, OTHER, WIDE, REST, SIZE, DESCRIBED)
            s = tl.dot(k2, q2.T, s)
            dp = tl.dot(v2, g2.T, dp)
        p = tl.exp2(s * (scale * LOG2_E) - (tl.load(lse + rows) * LOG2_E)[None, :])
        ds = (p * (dp - tl.load(delta + rows)[None, :])).to(q1.dtype)
        p = p.to(q1.dtype)
        dv1 = tl.dot(p, g1, dv1)
        dk1 = tl.dot(ds, q1, dk1)
        if REST > 0:
            dv2 = tl.dot(p, g2, dv2)
            dk2 = tl.dot(ds, q2, dk2)
    _put(dk, own, 3 * width, sums, dk1 * scale, 0, WIDE, SIZE)
    _put(dk + width, own, 3 * width, sums + width, dv1, 0, WIDE, SIZE)
    if REST > 0:
        _put(dk, own, 3 * width, sums, dk2 * scale, WIDE, REST, SIZE)
        _put(dk + width, own, 3 * width, sums + width, dv2, WIDE, REST, SIZE)


CUDNN_TOKENS = 128
"""From this number of tokens on, cuDNN's forward pass is faster than this one.

NVIDIA lists it as deterministic on Ampere, Ada and Hopper (cuDNN frontend, "Attention", support matrix), although torch does
not choose it in deterministic runs.
"""

POWER_OF_TWO_HEADS = {"OWN": 64, "OTHER": 32, "STAGES": 4, "num_warps": 4}
OTHER_HEADS = {"OWN": 64, "OTHER": 32, "STAGES": 3, "num_warps": 4}
"""Tokens of a program (OWN), tokens of one of its steps (OTHER), and launch settings: for heads whose size is a power of two,
and for other heads.

Nine to sixteen settings of each kernel were measured on an H100. These are the fastest, or within 4 % of the fastest.
"""


def _settings(qkv: Tensor, num_heads: int) -> dict[str, int]:
    """The compile-time arguments of the kernels."""
    tokens, size = qkv.shape[1], qkv.shape[2] // (3 * num_heads)
    wide = 1 << (size.bit_length() - 1)
    rest = max(16, triton.next_power_of_2(size - wide)) if size > wide else 0
    settings = OTHER_HEADS if rest else POWER_OF_TWO_HEADS
    own, other = (divisor(tokens, settings[name]) for name in ("OWN", "OTHER"))
    head = {"TOKENS": tokens, "SIZE": size, "WIDE": wide, "REST": rest}
    return {**settings, **head, "OWN": own, "OTHER": other, "DESCRIBED": has_tensor_copies(qkv.device)}


def _described(x: Tensor, settings: dict[str, int]) -> tuple[Tensor, TensorDescriptor | Tensor, TensorDescriptor | Tensor]:
    """`x` (B, T, ...), and two descriptors of its rows, which read OTHER tokens and WIDE or REST channels at a time."""
    if not settings["DESCRIBED"]:
        return x, x, x
    widths = settings["WIDE"], settings["REST"] or settings["WIDE"]
    wide, rest = (TensorDescriptor.from_tensor(x.flatten(0, 1), [settings["OTHER"], width]) for width in widths)
    return x, wide, rest


def attention(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """`operations.attention` without its projection to qkv: qkv (B, T, 3D) -> heads (B, T, D), log-sum-exp (B, heads, T)."""
    batch, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    if tokens >= CUDNN_TOKENS:
        q, k, v = qkv.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, T, D / heads)
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
        return out.transpose(1, 2).flatten(2), lse
    settings = _settings(qkv, num_heads)
    out = qkv.new_empty((batch, tokens, width))
    lse = qkv.new_empty((batch, num_heads, tokens), dtype=torch.float32)
    grid = (batch * num_heads * (tokens // settings["OWN"]),)
    scale = settings["SIZE"] ** -0.5
    _attention_forward[grid](*_described(qkv, settings), out, lse, num_heads, scale, **settings)
    return out, lse


def attention_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Gradient of qkv, (B, T, 3D), and its sum over all tokens, (3D,)."""
    batch, tokens, width = qkv.shape
    settings = _settings(qkv, num_heads)
    blocks = tokens // settings["OWN"]
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    partial = qkv.new_empty((batch * blocks, width), dtype=torch.float32)
    parts, grid, scale = _described(qkv, settings), (batch * num_heads * blocks,), settings["SIZE"] ** -0.5
    results = dqkv, partial, num_heads, scale
    _attention_backward_queries[grid](*parts, out, dout, lse, delta, *results, **settings)
    _attention_backward_keys[grid](*parts, *_described(dout, settings), lse, delta, *results, **settings)
    return dqkv, add_rows(partial, qkv.dtype)
