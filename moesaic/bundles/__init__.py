"""Expert bundles: a folder with a manifest and the weights of experts, the unit that people publish."""
