"""The ways in which a call reaches a worker."""
