"""Model: the LightningModule, its optimizer, its checkpoints and its report."""
