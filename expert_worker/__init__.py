"""Rows in, rows out: a process that holds some experts of a model and computes them for any router that asks."""
