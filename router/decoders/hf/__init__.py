"""The modules of transformers, with our parts in their seams."""
