"""Runs of the Trainer as small as they can be."""

import lightning.pytorch as pl


class Losses(pl.Callback):
    """Keeps the training loss and the learning rate of every update."""

    def __init__(self):
        self.losses, self.rates = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        self.rates.append(float(trainer.callback_metrics["lr"]))


def make_trainer(folder, *callbacks, **changes):
    options = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, pl.callbacks.ModelCheckpoint) for c in callbacks),
        "default_root_dir": str(folder),
        "callbacks": list(callbacks),
    }
    return pl.Trainer(**{**options, **changes})
