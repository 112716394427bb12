"""Data and models of image classification."""
