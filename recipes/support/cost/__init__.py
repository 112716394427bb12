"""What `benchmark.py` measures, and how it prints it."""
