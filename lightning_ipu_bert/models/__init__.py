"""Models as LightningModules, and how they are cut into blocks."""
