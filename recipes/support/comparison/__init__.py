"""What `compare.py` plans, runs and reports."""
