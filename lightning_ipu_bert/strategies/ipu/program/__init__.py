"""The programs that PopTorch compiles: tracing, placement, optimizer, and state."""
