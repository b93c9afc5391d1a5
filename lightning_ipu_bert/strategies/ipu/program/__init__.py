"""The programs that PopTorch compiles: what is traced, placed, optimized and kept in step."""
