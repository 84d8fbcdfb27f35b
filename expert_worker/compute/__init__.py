"""Turns waiting calls into grouped passes."""
