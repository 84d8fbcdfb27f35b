"""Experts that outlive their worker: laid out or quantised weights in files of shared memory, mapped and not copied."""
