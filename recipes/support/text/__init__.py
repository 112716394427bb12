"""Data and metrics of text: GLUE, language models, and the reviews of the demo."""
