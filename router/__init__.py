"""Tokens in, tokens out: engine, scheduler, KV cache, the model with its three seams, dispatcher, public gRPC service."""
