"""Gates: which experts compute a token, by the family's rule."""
