"""Frozen values that check themselves when they are made. The floor under everything but ``errors``."""
