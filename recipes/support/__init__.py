"""Modules that the recipes share. They are not run directly."""
