"""Commands that are not verbs of the Trainer."""
