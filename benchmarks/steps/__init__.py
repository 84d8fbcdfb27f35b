"""A model of how long a step takes: equations, their fit to measurements, a simulation that checks them, and what follows."""
