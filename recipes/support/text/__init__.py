"""Data and metrics for text: GLUE and other text classification, language models, and the demo."""
