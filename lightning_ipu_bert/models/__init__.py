"""LightningModules of models, and their blocks."""
