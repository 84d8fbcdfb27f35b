"""Dispatch and combine: one MoE layer computed by experts in other processes."""
