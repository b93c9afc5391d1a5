"""IPUs, through PopTorch."""
