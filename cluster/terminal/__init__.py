"""What a person reads in a terminal, and what a program reads instead."""
