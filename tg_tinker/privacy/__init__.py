"""Differential privacy: clipping, noise, accounting, the ledger and the rules around them. No HTTP, no engine."""
