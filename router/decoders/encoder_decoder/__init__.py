"""Switch and NLLB: an encoder reads the prompt, a decoder writes the answer."""
