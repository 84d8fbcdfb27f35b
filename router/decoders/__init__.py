"""The model without its experts: one decoder a kind of family."""
