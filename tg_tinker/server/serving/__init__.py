"""Serving: samplers, the weights that each is served by, and the samples that are asked of them."""
