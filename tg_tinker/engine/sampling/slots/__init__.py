"""Decoding by our own pass over the weights of Llama-like models: one matrix for all sequences and adapters."""
