"""Load, latency and throughput of a running server."""
