"""The servers that accept calls and send their answers."""
