"""The plan, the runs and the report of `compare.py`."""
