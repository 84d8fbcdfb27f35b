"""HTTP in, gRPC out: the OpenAI API on top of a router. No model code, and never torch."""
