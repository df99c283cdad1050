"""Triton kernels for what lies between the matrix products, and for one product that ends in it.

`dit.fused.operations` holds their formulas in plain PyTorch. Tokens are rows: (B, T, D) is (B * T, D). All arithmetic but that
of products is float32, whatever the tensors hold. What must be summed over tokens (shift, scale, gate, biases) is added per
chunk of tokens, in a fixed order and without atomics, so that it repeats exactly.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dit.fused import cublaslt, operations

PROGRAMS = 1024
"""Into how many programs the norm's backward is cut, at least: enough for every multiprocessor to have several in flight."""

NORM_STAGES = 3
"""Tokens in flight in one program of the norm's backward."""

FOLD = 256
"""Columns of one program that adds partial sums."""

ROWS, COLUMNS = 512, 512
"""Of one program that adds the gradient of a bias, at most."""

NARROW = 768
"""Up to this width, on Hopper, the product here that ends in the GELU's derivative beats cuBLASLt's with a sum after it.

Measured on an H100: 0.28 ms instead of 0.34 for the 65536 tokens of DiT-S/2, 0.69 instead of 0.72 for DiT-B/2; but 0.70 instead
of 0.67 for the 32768 of DiT-XL/2.
"""


@triton.jit
def _residual_norm_forward(
    x, branch, bias, gate, shift, scale, x_out, h, mean_out, rstd_out, tokens, gate_stride, stride, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """One program: CHUNK tokens of one sample. `x` is one sample that all share, where SHARED."""
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    first = tl.program_id(0) * CHUNK
    sample = first // tokens
    first_x = first % tokens if SHARED else first
    shift_row = tl.load(shift + sample * stride + columns, inside, 0.0).to(tl.float32)
    scale_row = 1.0 + tl.load(scale + sample * stride + columns, inside, 0.0).to(tl.float32)
    gate_row = tl.load(gate + sample * gate_stride + columns, inside, 0.0).to(tl.float32)
    bias_row = tl.load(bias + columns, inside, 0.0).to(tl.float32)
    for row in range(CHUNK):
        at = (first + row).to(tl.int64) * D + columns
        old = tl.load(x + (first_x + row).to(tl.int64) * D + columns, inside, 0.0).to(tl.float32)
        added = tl.load(branch + at, inside, 0.0).to(tl.float32) + bias_row
        rounded = (old + gate_row * added).to(x_out.dtype.element_ty)
        tl.store(x_out + at, rounded, inside)
        value = rounded.to(tl.float32)
        mean = tl.sum(value, 0) / D
        centred = tl.where(inside, value - mean, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / D + eps)
        tl.store(mean_out + first + row, mean)
        tl.store(rstd_out + first + row, rstd)
        tl.store(h + at, (centred * rstd * scale_row + shift_row).to(h.dtype.element_ty), inside)


@triton.jit
def _residual_norm_backward(
    dx_out, dh, x_out, branch, bias, gate, scale, mean_in, rstd_in, dx, dbranch, partial, tokens, planes, gate_stride, stride,
    D: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: CHUNK tokens of one sample; its sums go to `partial` (4, planes, D): of dh, dh xhat, dx branch, dx."""
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    program = tl.program_id(0)
    first = program * CHUNK
    sample = first // tokens
    scale_row = 1.0 + tl.load(scale + sample * stride + columns, inside, 0.0).to(tl.float32)
    gate_row = tl.load(gate + sample * gate_stride + columns, inside, 0.0).to(tl.float32)
    bias_row = tl.load(bias + columns, inside, 0.0).to(tl.float32)
    sum_shift = tl.zeros([BLOCK], tl.float32)
    sum_scale = tl.zeros([BLOCK], tl.float32)
    sum_gate = tl.zeros([BLOCK], tl.float32)
    sum_dx = tl.zeros([BLOCK], tl.float32)
    for row in tl.range(CHUNK, num_stages=STAGES):
        at = (first + row).to(tl.int64) * D + columns
        dhidden = tl.load(dh + at, inside, 0.0).to(tl.float32)
        value = tl.load(x_out + at, inside, 0.0).to(tl.float32)
        dresidual = tl.load(dx_out + at, inside, 0.0).to(tl.float32)
        added = tl.load(branch + at, inside, 0.0).to(tl.float32) + bias_row
        rstd = tl.load(rstd_in + first + row)
        xhat = tl.where(inside, (value - tl.load(mean_in + first + row)) * rstd, 0.0)
        dxhat = dhidden * scale_row
        dvalue = dresidual + rstd * (dxhat - tl.sum(dxhat, 0) / D - xhat * (tl.sum(dxhat * xhat, 0) / D))
        sum_shift += dhidden
        sum_scale += dhidden * xhat
        sum_gate += dvalue * added
        sum_dx += dvalue
        tl.store(dx + at, dvalue.to(dx.dtype.element_ty), inside)
        tl.store(dbranch + at, (dvalue * gate_row).to(dbranch.dtype.element_ty), inside)
    out = partial + program.to(tl.int64) * D + columns
    plane = planes.to(tl.int64) * D
    tl.store(out, sum_shift, inside)
    tl.store(out + plane, sum_scale, inside)
    tl.store(out + 2 * plane, sum_gate, inside)
    tl.store(out + 3 * plane, sum_dx, inside)


@triton.jit
def _fold(
    partial, gate, dshift, dscale, dgate, dbias, planes, gate_stride, D: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr
):
    """One program: BLOCK columns of one sample; adds its CHUNKS partial sums. `dbias` is per sample here."""
    sample = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < D
    plane = planes.to(tl.int64) * D
    at = partial + sample.to(tl.int64) * CHUNKS * D + columns
    total_shift = tl.zeros([BLOCK], tl.float32)
    total_scale = tl.zeros([BLOCK], tl.float32)
    total_gate = tl.zeros([BLOCK], tl.float32)
    total_dx = tl.zeros([BLOCK], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        total_shift += tl.load(at + chunk * D, inside, 0.0)
        total_scale += tl.load(at + plane + chunk * D, inside, 0.0)
        total_gate += tl.load(at + 2 * plane + chunk * D, inside, 0.0)
        total_dx += tl.load(at + 3 * plane + chunk * D, inside, 0.0)
    gate_row = tl.load(gate + sample * gate_stride + columns, inside, 0.0).to(tl.float32)
    out = sample * D + columns
    tl.store(dshift + out, total_shift.to(dshift.dtype.element_ty), inside)
    tl.store(dscale + out, total_scale.to(dscale.dtype.element_ty), inside)
    tl.store(dgate + out, total_gate.to(dgate.dtype.element_ty), inside)
    tl.store(dbias + out, total_dx * gate_row, inside)


def _chunk(batch: int, tokens: int) -> int:
    """Tokens of one sample that one program of the norm's backward walks through; at most 16 programs share a sample."""
    chunks = 1
    while tokens % (2 * chunks) == 0 and batch * chunks < PROGRAMS and chunks < 16:
        chunks *= 2
    return tokens // chunks


def residual_norm(
    x: Tensor, branch: Tensor, bias: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`operations.residual_norm` forward: new x, h, and the rows' mean and inverse deviation (B * T,)."""
    batch, tokens, width = branch.shape
    chunk, block = _divisor(tokens, 4), triton.next_power_of_2(width)
    x_out, h = torch.empty_like(branch), torch.empty_like(branch)
    mean, rstd = branch.new_empty((2, batch * tokens), dtype=torch.float32)
    _residual_norm_forward[(batch * tokens // chunk,)](
        x, branch, bias, gate, shift, scale, x_out, h, mean, rstd, tokens, gate.stride(0), shift.stride(0), eps,
        D=width, BLOCK=block, CHUNK=chunk, SHARED=len(x) < batch, num_warps=1,
    )  # fmt: skip
    return x_out, h, mean, rstd


def residual_norm_backward(
    dx_out: Tensor, dh: Tensor, x_out: Tensor, branch: Tensor, bias: Tensor, gate: Tensor, scale: Tensor, mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, branch, bias, gate, shift and scale."""
    batch, tokens, width = x_out.shape
    chunk, block = _chunk(batch, tokens), triton.next_power_of_2(width)
    planes = batch * tokens // chunk
    dx, dbranch = torch.empty_like(x_out), torch.empty_like(x_out)
    partial = x_out.new_empty((4, planes, width), dtype=torch.float32)
    _residual_norm_backward[(planes,)](
        dx_out, dh, x_out, branch, bias, gate, scale, mean, rstd, dx, dbranch, partial, tokens, planes, gate.stride(0),
        scale.stride(0), D=width, BLOCK=block, CHUNK=chunk, STAGES=NORM_STAGES, num_warps=max(1, block // 256),
    )  # fmt: skip
    dshift, dscale, dgate = (scale.new_empty((batch, width)) for _ in range(3))
    dbias = scale.new_empty((batch, width), dtype=torch.float32)
    _fold[(batch, triton.cdiv(width, FOLD))](
        partial, gate, dshift, dscale, dgate, dbias, planes, gate.stride(0), D=width, BLOCK=FOLD, CHUNKS=tokens // chunk,
        num_warps=FOLD // 128,
    )  # fmt: skip
    return dx, dbranch, _total(dbias, scale.dtype), dgate, dshift, dscale


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
ROOT, CUBE = tl.constexpr(operations.ROOT), tl.constexpr(operations.CUBE)


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
    own, other = (_divisor(tokens, settings[name]) for name in ("OWN", "OTHER"))
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
    if not sizes["REST"] and _is_hopper(qkv.device):
        sizes |= EVEN_HEADS_ON_HOPPER
    blocks = tokens // sizes["OWN"]
    dqkv = torch.empty_like(qkv)
    partial = qkv.new_empty((batch * blocks, width), dtype=torch.float32)
    grid = (batch * num_heads * blocks,)
    delta = torch.empty_like(lse)
    head = {name: sizes[name] for name in ("TOKENS", "SIZE", "WIDE", "REST", "OWN")}
    _attention_delta[grid](out, dout, delta, num_heads, **head, num_warps=4)
    _attention_backward[grid](qkv, dout, lse, delta, dqkv, partial, num_heads, sizes["SIZE"] ** -0.5, **sizes)
    return dqkv, _total(partial, qkv.dtype)


@triton.jit
def _sum_rows(x, out, D: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr):
    """One program: CHUNK rows of BLOCK columns, added to one row of `out`."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([STEP, BLOCK], tl.float32)
    for start in tl.range(0, CHUNK, STEP, num_stages=3):
        rows = (tl.program_id(0) * CHUNK + start + tl.arange(0, STEP)).to(tl.int64)
        total += tl.load(x + rows[:, None] * D + columns[None, :]).to(tl.float32)
    tl.store(out + tl.program_id(0) * D + columns, tl.sum(total, 0).to(out.dtype.element_ty))


def sum_rows(x: Tensor) -> Tensor:
    """Sum over all but the last dimension, (D,)."""
    width = x.shape[-1]
    rows, block = x.numel() // width, _divisor(width, COLUMNS)
    chunk = _divisor(rows, ROWS)
    partial = x.new_empty((rows // chunk, width), dtype=torch.float32)
    _sum_rows[(rows // chunk, width // block)](x, partial, D=width, BLOCK=block, CHUNK=chunk, STEP=min(8, chunk), num_warps=4)
    return _total(partial, x.dtype)


def _total(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over the rows of a small matrix (rows, D) in float32 -> (D,) in `dtype`."""
    rows, width = partial.shape
    out = partial.new_empty((width,), dtype=dtype)
    step, block = _divisor(rows, 64), _divisor(width, 32)
    _sum_rows[(1, width // block)](partial, out, D=width, BLOCK=block, CHUNK=rows, STEP=step, num_warps=4)
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`."""
    return cublaslt.linear(x.flatten(0, 1), weight, bias).view(*x.shape[:2], -1)


def gelu_linear(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The GELU of `h @ weight.T + bias`."""
    return cublaslt.gelu_linear(h.flatten(0, 1), weight, bias).view(*h.shape[:2], -1)


def linear_gelu(h: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The GELU of `u = h @ weight.T + bias`, and u."""
    a, u = cublaslt.linear_gelu(h.flatten(0, 1), weight, bias)
    return a.view(*h.shape[:2], -1), u.view(*h.shape[:2], -1)


def matmul(dy: Tensor, weight: Tensor) -> Tensor:
    """`dy @ weight`."""
    return cublaslt.matmul(dy.flatten(0, 1), weight).view(*dy.shape[:2], -1)


@triton.jit
def _dgelu(u):
    """The derivative of the tanh-approximated GELU, with the GPU's own approximation of tanh: 11 bits, where bf16 has 8."""
    square = u * u
    z = u * (ROOT + ROOT * CUBE * square)
    t = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [z], dtype=tl.float32, is_pure=True, pack=1)
    return 0.5 * (1.0 + t) + 0.5 * u * (1.0 - t * t) * (ROOT + 3.0 * ROOT * CUBE * square)


@triton.jit
def _matmul_dgelu(
    dy, weight, u, du, partial, rows, columns,
    K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """One program: a tile of `du`, and its sums over rows. Tiles of TOGETHER rows of tiles are next to each other in time."""
    across = tl.cdiv(columns, COLUMNS)
    group = tl.program_id(0) // (TOGETHER * across)
    height = tl.minimum(tl.cdiv(rows, ROWS) - group * TOGETHER, TOGETHER)
    within = tl.program_id(0) % (TOGETHER * across)
    row, column = group * TOGETHER + within % height, within // height
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(0, K, DEPTH):
        product = tl.dot(dy.load([row * ROWS, k]), weight.load([k, column * COLUMNS]), product)
    gradient = product * _dgelu(u.load([row * ROWS, column * COLUMNS]).to(tl.float32))
    du.store([row * ROWS, column * COLUMNS], gradient.to(tl.bfloat16))
    at = column * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(partial + row * columns + at, tl.sum(gradient, 0), at < columns)


@cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


TILE = {"ROWS": 128, "COLUMNS": 128, "DEPTH": 64, "TOGETHER": 8, "num_stages": 3, "num_warps": 4}
"""Of `_matmul_dgelu`: the fastest of fourteen that were measured."""


def matmul_dgelu(dy: Tensor, weight: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """`(dy @ weight) * gelu'(u)`, and its sum over all but the last dimension."""
    flat, wide = dy.flatten(0, 1), u.flatten(0, 1)
    (rows, depth), columns = flat.shape, wide.shape[1]
    if depth > NARROW or not _is_hopper(dy.device):
        du = cublaslt.matmul_dgelu(flat, weight, wide).view_as(u)
        return du, sum_rows(du)
    du = torch.empty_like(wide)
    down, across = triton.cdiv(rows, TILE["ROWS"]), triton.cdiv(columns, TILE["COLUMNS"])
    partial = du.new_empty((down, columns), dtype=torch.float32)
    blocks = ("ROWS", "DEPTH"), ("DEPTH", "COLUMNS"), ("ROWS", "COLUMNS"), ("ROWS", "COLUMNS")
    described = [
        TensorDescriptor.from_tensor(tensor, [TILE[side] for side in block])
        for tensor, block in zip((flat, weight, wide, du), blocks, strict=True)
    ]
    _matmul_dgelu[(down * across,)](*described, partial, rows, columns, K=depth, **TILE)
    return du.view_as(u), _total(partial, du.dtype)


def outer(dy: Tensor, x: Tensor, place: Tensor | None = None) -> Tensor:
    """Gradient of the weight of a linear layer: (B, T, M) and (B, T, K) -> (M, K), a new tensor or a view of `place`."""
    return cublaslt.outer(dy.flatten(0, 1), x.flatten(0, 1), None if place is None else place.view_as(place))


def _divisor(number: int, most: int) -> int:
    """The greatest power of two up to `most` that divides `number`."""
    return min(most, number & -number)


ELEMENTS = 4096
"""Elements of one weight that one program of the optimiser updates."""


@triton.jit
def _update(
    weight, copy, gradient, first, second, average, at, inside, factor, step_size, decay, beta1, beta2, root_correction, eps,
    ema_weight,
):  # fmt: skip
    g = tl.load(gradient + at, inside, 0.0).to(tl.float32) * factor
    w = tl.load(weight + at, inside, 0.0)
    m = tl.load(first + at, inside, 0.0)
    v = tl.load(second + at, inside, 0.0)
    e = tl.load(average + at, inside, 0.0)
    m += (1.0 - beta1) * (g - m)
    v = beta2 * v + (1.0 - beta2) * g * g
    w = w * decay - step_size * m / (tl.sqrt(v) / root_correction + eps)
    tl.store(weight + at, w, inside)
    tl.store(copy + at, w.to(tl.bfloat16), inside)
    tl.store(first + at, m, inside)
    tl.store(second + at, v, inside)
    tl.store(average + at, e + ema_weight * (w - e), inside)


@triton.jit
def _adamw_ema(
    addresses, lengths, owner, offset, factor, step_size, decay, beta1, beta2, root_correction, eps, ema_weight,
    COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK elements of one weight. `addresses` (6, COUNT): weight, copy, gradient, moments, average."""
    which = tl.load(owner + tl.program_id(0))
    start = tl.multiple_of(tl.load(offset + tl.program_id(0)), BLOCK)
    length = tl.load(lengths + which)
    at = start + tl.arange(0, BLOCK)
    weight = tl.multiple_of(tl.load(addresses + which), 16).to(tl.pointer_type(tl.float32))
    copy = tl.multiple_of(tl.load(addresses + COUNT + which), 16).to(tl.pointer_type(tl.bfloat16))
    gradient = tl.multiple_of(tl.load(addresses + 2 * COUNT + which), 16).to(tl.pointer_type(tl.bfloat16))
    first = tl.multiple_of(tl.load(addresses + 3 * COUNT + which), 16).to(tl.pointer_type(tl.float32))
    second = tl.multiple_of(tl.load(addresses + 4 * COUNT + which), 16).to(tl.pointer_type(tl.float32))
    average = tl.multiple_of(tl.load(addresses + 5 * COUNT + which), 16).to(tl.pointer_type(tl.float32))
    scale = tl.load(factor)
    if start + BLOCK <= length:
        _update(
            weight, copy, gradient, first, second, average, at, at >= 0, scale, step_size, decay, beta1, beta2, root_correction,
            eps, ema_weight,
        )  # fmt: skip
    else:
        _update(
            weight, copy, gradient, first, second, average, at, at < length, scale, step_size, decay, beta1, beta2,
            root_correction, eps, ema_weight,
        )  # fmt: skip


class AdamWEMA:
    """One launch that updates every weight, its bf16 copy, its moments and its average."""

    def __init__(self, weights: list[Tensor], *others: list[Tensor]) -> None:
        """`weights`, then their copies, gradients, first and second moments and averages, all contiguous."""
        device = weights[0].device
        columns = (weights, *others)
        self.addresses = torch.tensor([[tensor.data_ptr() for tensor in column] for column in columns], device=device)
        lengths = [weight.numel() for weight in weights]
        chunks = [(index, start) for index, length in enumerate(lengths) for start in range(0, length, ELEMENTS)]
        self.owner, self.offset = (torch.tensor(column, device=device) for column in zip(*chunks, strict=True))
        self.lengths = torch.tensor(lengths, device=device)

    def __call__(
        self, factor: Tensor, *, step_size: float, decay: float, betas: tuple[float, float], root_correction: float,
        eps: float, ema_weight: float,
    ) -> None:  # fmt: skip
        """`factor`, a scalar on the device, multiplies every gradient; `step_size` is lr over the first bias correction."""
        _adamw_ema[(len(self.owner),)](
            self.addresses, self.lengths, self.owner, self.offset, factor, step_size, decay, *betas, root_correction, eps,
            ema_weight, COUNT=len(self.lengths), BLOCK=ELEMENTS, num_warps=8,
        )  # fmt: skip
