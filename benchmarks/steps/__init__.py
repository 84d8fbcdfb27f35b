"""A model of how long a step takes: equations, their fit, a simulation that checks them, forecasts."""
