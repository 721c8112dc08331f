"""Serving: models, published versions, and the samples that are asked of them."""
