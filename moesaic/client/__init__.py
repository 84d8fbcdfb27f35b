"""The clients of a router, and the command of an install that has nothing else."""
