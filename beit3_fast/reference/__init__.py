"""The formulas in plain PyTorch, any dtype up to fp64, differentiable: the truth, never tuned."""
