"""Unlearning: losses that forget part of the data, attacks, and unlearning without gradients."""
