"""Weights: base models in memory, and the versions that runs have published of their adapters."""
