"""Base models: fetched, converted, loaded, frozen."""
