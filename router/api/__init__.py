"""The public gRPC service: checks and completes requests, turns the engine's events into replies."""
