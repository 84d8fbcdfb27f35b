"""The public service: requests checked and completed, events turned into replies."""
