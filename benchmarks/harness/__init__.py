"""The parts that the benchmarks share: sides in turn, processes started by hand, load, and results on disk."""
