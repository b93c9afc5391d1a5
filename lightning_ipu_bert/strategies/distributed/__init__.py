"""Pipeline parallelism on CPUs and GPUs, based on `torch.distributed.pipelining`."""
