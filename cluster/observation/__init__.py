"""Observing a running cluster through the counters of its processes."""
