"""Configuration of IPUs: the fields of `ipu_config.json` and the rules of PopTorch. No torch."""
