"""Kernels for NVIDIA GPUs in bf16: operations of a transformer and an autoencoder, each with a reference in PyTorch."""
