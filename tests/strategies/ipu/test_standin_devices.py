"""Devices in the stand-in: tensors of host and IPU do not mix, replicas keep their buffers."""

import poptorch
import pytest
import torch
from torch import nn


class OnDevice(nn.Module):
    """Mixes its input with a tensor of a device."""

    def __init__(self, device):
        super().__init__()
        self.scale, self.device = nn.Linear(1, 1), device
        self.constant = torch.ones(1)

    def forward(self, x):
        device = x.device if self.device == "its own" else self.device
        other = torch.ones(1, device=device) if device != "constant" else self.constant
        return poptorch.identity_loss(self.scale(x) * other, "mean")


@pytest.mark.parametrize("device", ["cpu", "constant"])
def test_tensors_on_the_host_do_not_mix_with_those_on_an_ipu(device):
    model = poptorch.trainingModel(OnDevice(device))
    with pytest.raises(poptorch.Error, match="Expected an IPU tensor but got"):
        model.compile(torch.ones(2, 1))


@pytest.mark.parametrize("device", ["its own", None])
def test_tensors_of_the_device_of_an_input_or_of_none_do(device):
    poptorch.trainingModel(OnDevice(device)).compile(torch.ones(2, 1))


class Statistics(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(1)

    def forward(self, x):
        return poptorch.identity_loss(self.norm(x), "mean")


@pytest.mark.parametrize("broadcasts", [True, False])
def test_buffers_of_replicas_cannot_be_broadcast(broadcasts):
    options = poptorch.Options().replicationFactor(2).broadcastBuffers(broadcasts)
    model = poptorch.trainingModel(Statistics(), options)
    if broadcasts:
        with pytest.raises(poptorch.Error, match="does not support broadcasting buffers"):
            model.compile(torch.ones(4, 1))
    else:
        model.compile(torch.ones(4, 1))
