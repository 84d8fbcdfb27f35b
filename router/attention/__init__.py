"""Paged attention over packed batches: what each layer sees, which calls attend, and the calls themselves."""
