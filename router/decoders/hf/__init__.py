"""The modules of transformers, wired into our seams."""
