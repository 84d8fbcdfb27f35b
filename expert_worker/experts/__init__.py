"""The experts that a worker holds: read, checked, computed."""
