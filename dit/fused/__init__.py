"""Kernels for an NVIDIA GPU in bf16: operations of a transformer and of an autoencoder, each with its reference in PyTorch."""
