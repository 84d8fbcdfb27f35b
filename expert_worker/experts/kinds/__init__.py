"""Kinds of expert: what an expert of a bundle is made of, and how it becomes one that computes."""
