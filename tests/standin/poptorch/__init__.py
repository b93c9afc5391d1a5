"""A stand-in for PopTorch 3.4 on machines without Graphcore's SDK: as strict as the real one.

It runs on the CPU what the IPUs would run: a graph that was traced once and is played back. Names
and parameters are those of PopTorch's manifest; behaviour follows its sources and user guide. What
it does not have raises AttributeError, as a name that is not there.

`device.POOL` says how many IPUs there are; `device.COUNTS` how often weights travelled.
"""

from poptorch import device, optim
from poptorch.dataloader import AsynchronousDataAccessor, DataLoader
from poptorch.device import Error, ipuHardwareIsAvailable, ipuHardwareVersion
from poptorch.enums import (
    AutoStage,
    ConnectionType,
    DataLoaderMode,
    MeanReductionStrategy,
    OutputMode,
    ReductionType,
)
from poptorch.executor import PoplarExecutor, inferenceModel, trainingModel
from poptorch.graph import BeginBlock, Block, identity_loss, recomputationCheckpoint, removeBlocks
from poptorch.options import (
    Options,
    PipelinedExecution,
    ShardedExecution,
    TensorLocationSettings,
)

__version__ = "3.4.0-standin"
