"""The model without its experts: one decoder for each kind of family."""
