"""A model's folder: its config and the headers of its safetensors files."""
