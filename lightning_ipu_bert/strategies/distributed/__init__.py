"""Stages and replicas on CPUs and GPUs, over `torch.distributed.pipelining`."""
