"""Training: what is minimised, and the loop that does it."""
