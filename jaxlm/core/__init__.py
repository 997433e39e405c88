"""What every room uses: paths, views, taps, random numbers, precision, checks, errors."""
