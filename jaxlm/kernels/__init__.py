"""Empirical neural tangent kernels of any function, for SGD, SignGD and Adam."""
