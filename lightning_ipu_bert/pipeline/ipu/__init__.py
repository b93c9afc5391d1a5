"""IPU-specific configuration: the fields of `ipu_config.json` and the rules of PopTorch. No torch."""
