"""Which experts a token goes to: the family's rule."""
