"""The control plane: observes the processes, and publishes what the model is and where it is."""
