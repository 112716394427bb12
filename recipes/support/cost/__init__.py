"""The workload of `benchmark.py`, other implementations of SAM to compare with, and the table of results."""
