"""What optimal transport costs here, in ratios measured in one process: `python -m benchmarks`."""
