"""Training of any LightningModule: checkpoint files, optimizer, report, callbacks."""
