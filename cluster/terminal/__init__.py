"""Output of the command line: tables and progress for a terminal, JSON for programs."""
