"""Text to token ids and back: tokenizers, chat formats, stop strings."""
