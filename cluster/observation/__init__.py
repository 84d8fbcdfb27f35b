"""A running cluster as seen from outside."""
