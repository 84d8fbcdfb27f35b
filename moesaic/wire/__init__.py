"""Tensors and messages as bytes."""
