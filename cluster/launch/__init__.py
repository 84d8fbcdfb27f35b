"""From nothing to ready and back to nothing."""
