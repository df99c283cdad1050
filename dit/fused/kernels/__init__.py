"""Triton kernels for what lies between the matrix products, and the products, some of which end in it.

`dit.fused.operations` holds their formulas in plain PyTorch. Tokens are rows: (B, T, D) is (B * T, D). All arithmetic but that
of products is float32, whatever the tensors hold. What must be summed over tokens (shift, scale, gate, biases) is added per
chunk of tokens, in a fixed order and without atomics, so that it repeats exactly.
"""

from dit.fused.kernels.adamw import AdamWEMA
from dit.fused.kernels.attention import attention, attention_backward
from dit.fused.kernels.norm import residual_norm, residual_norm_backward
from dit.fused.kernels.products import gelu_linear, linear, linear_gelu, matmul, matmul_dgelu, outer
from dit.fused.kernels.sums import sum_rows

__all__ = [
    "AdamWEMA",
    "attention",
    "attention_backward",
    "gelu_linear",
    "linear",
    "linear_gelu",
    "matmul",
    "matmul_dgelu",
    "outer",
    "residual_norm",
    "residual_norm_backward",
    "sum_rows",
]
