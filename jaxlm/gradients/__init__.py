"""Gradients of single examples, what Adam makes of them, and random projections."""
