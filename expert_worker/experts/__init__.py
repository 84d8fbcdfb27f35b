"""Reads, checks, holds and computes the experts of a worker."""
