"""Model folders: found, inspected, converted."""
