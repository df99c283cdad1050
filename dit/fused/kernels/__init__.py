"""The matrix products, some fused with the operation that follows, and Triton kernels for the operations between them.

`dit.fused.operations` has their formulas in plain PyTorch. Tokens are rows: (B, T, D) is (B * T, D). All arithmetic except that
of products is float32, whatever the dtype of the tensors. Sums over tokens (for shift, scale, gate and biases) are computed per
chunk of tokens, in a fixed order and without atomics, so that results repeat exactly.
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
