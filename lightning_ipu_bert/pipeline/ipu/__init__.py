"""What only IPUs know: the fields of `ipu_config.json`, and the rules of PopTorch. No torch."""
