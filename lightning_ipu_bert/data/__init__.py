"""Data: questions and passages become features, logits become answers."""
