"""From waiting calls to one grouped pass."""
