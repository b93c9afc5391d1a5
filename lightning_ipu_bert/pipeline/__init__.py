"""The plan of a pipeline in plain values: stages, batches, schedules and their rules. No torch."""
