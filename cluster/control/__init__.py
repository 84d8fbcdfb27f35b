"""The control plane: what is wanted, what is observed, what is published."""
