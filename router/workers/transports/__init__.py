"""The transports that carry a call to a worker."""
