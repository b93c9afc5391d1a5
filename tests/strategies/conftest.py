"""Pipelines need torch.distributed.pipelining, which the SDK's torch 2.0 does not have."""

import importlib.util

if importlib.util.find_spec("torch.distributed.pipelining") is None:
    collect_ignore_glob = ["test_*.py"]
