"""Figures of comparisons, of the demo and of cost."""
