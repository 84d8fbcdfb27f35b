"""The loop: choose a step, run it, sample, report."""
