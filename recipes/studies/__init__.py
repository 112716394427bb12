"""What the evidence was made with: `evidence` holds the settings, `results` the figures."""
