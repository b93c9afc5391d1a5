"""Commands: the verbs beside the Trainer's own."""
