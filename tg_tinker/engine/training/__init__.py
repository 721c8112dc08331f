"""Training: rows in, losses and gradients out, optimizer steps."""
