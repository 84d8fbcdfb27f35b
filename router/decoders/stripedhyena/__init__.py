"""StripedHyena: attention and Hyena mixers in one stack."""
