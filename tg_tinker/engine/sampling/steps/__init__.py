"""Decoding by transformers' own passes, for every other model: sequences of one adapter together where they may."""
