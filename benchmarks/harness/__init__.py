"""The parts that benchmarks share: sides in turn, processes started by hand, load, results on disk."""
