"""The control plane: observes the processes, decides what the model is and where it is, and publishes both."""
