"""What the router learns from the control plane."""
