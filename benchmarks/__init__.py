"""One question a file: `python -m benchmarks.<name> [--quick]`."""
