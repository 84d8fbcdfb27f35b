"""Generated stubs of protos/moesaic/v1; `make protos` writes them anew."""
