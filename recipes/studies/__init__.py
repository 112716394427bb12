"""The studies behind the evidence: `evidence` holds their settings, `results` their results."""
