"""Paged attention over a packed batch."""
