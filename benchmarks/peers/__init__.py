"""The comparison with other simulators: `python -m benchmarks.peers`."""
