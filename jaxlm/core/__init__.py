"""What two rooms share: paths, randomness, views, taps, errors."""
