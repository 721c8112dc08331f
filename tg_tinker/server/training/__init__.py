"""Training runs and their operations on both surfaces."""
