"""Sampling: continuous batching over requests and adapters."""
