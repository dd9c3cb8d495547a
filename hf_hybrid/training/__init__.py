"""Examples in, loss out: the joint clean and noisy objective."""
