"""Options: freeze once they are used."""

import copy

import torch

from poptorch.enums import (
    AutoStage,
    ConnectionType,
    MeanReductionStrategy,
    OutputMode,
    ReductionType,
)


class _Freezable:
    _frozen = False

    def __init__(self, **values):
        self.__dict__["values"] = values

    def set(self, **values):
        self.check()
        for name, value in values.items():
            assert self.exists(name), f"Invalid option {name}, valid options are {[*self.values]}"
            kind = type(self.values[name])
            assert isinstance(value, kind), (
                f"Unexpected type {type(value)} for option {name}. Expected {kind}"
            )
            self.values[name] = value
        return self

    def createOrSet(self, **values):
        self.check()
        self.values.update(values)
        return self

    def __setattr__(self, name, value):
        own = name.startswith("_") or isinstance(value, _Freezable)  # the groups of options
        super().__setattr__(name, value) if own else self.set(**{name: value})

    def check(self):
        if self._frozen:
            raise AttributeError("Can't modify frozen Options")

    def exists(self, option):
        return option in self.values

    def __getattr__(self, name):
        if name.startswith("_") or "values" not in self.__dict__ or name not in self.values:
            raise AttributeError(f"Invalid attribute {name}.")
        return self.values[name]

    def toDict(self):
        return dict(self.values)


class _PopartOptions(_Freezable):
    def __init__(self):
        super().__init__()
        self.__dict__["options"] = {"instrumentWithHardwareCycleCounter": False}

    def set(self, key, value):
        self.check()
        self.options[key] = value
        return self

    def setEngineOptions(self, engine_options):
        return self.set("engineOptions", engine_options)

    def setPatterns(self, patterns, level=2):
        assert isinstance(patterns, dict) and isinstance(level, int)
        self.set("patterns_level", level)
        return self.set("patterns", patterns)


class _PrecisionOptions(_Freezable):
    def __init__(self, popart_options):
        super().__init__()
        self._popart = popart_options

    def enableStochasticRounding(self, enabled):
        self._popart.set("enableStochasticRounding", enabled)
        return self

    def setPartialsType(self, dtype):
        if dtype not in (torch.float16, torch.float32):
            raise ValueError("parameter to setPartialsType should be torch.float or torch.half")
        name = "half" if dtype == torch.float16 else "float"
        self._popart.set("partialsTypeMatMuls", name)
        self._popart.set("convolutionOptions", {"partialsType": name})
        return self


class _TrainingOptions(_Freezable):
    def __init__(self, popart_options):
        super().__init__(
            gradient_accumulation=1,
            accumulation_and_replication_reduction_type=ReductionType.Mean,
            meanAccumulationAndReplicationReductionStrategy=MeanReductionStrategy.Post,
        )
        self._popart = popart_options

    def gradientAccumulation(self, gradient_accumulation):
        return self.set(gradient_accumulation=gradient_accumulation)

    def accumulationAndReplicationReductionType(self, reduction_type):
        if reduction_type not in (ReductionType.Mean, ReductionType.Sum):
            raise ValueError("accumulationAndReplicationReductionType must be Mean or Sum")
        return self.set(accumulation_and_replication_reduction_type=reduction_type)

    def setMeanAccumulationAndReplicationReductionStrategy(self, mean_reduction_strategy):
        return self.set(meanAccumulationAndReplicationReductionStrategy=mean_reduction_strategy)

    def setAutomaticLossScaling(self, enabled):
        assert isinstance(enabled, bool)
        self._popart.set("automaticLossScalingSettings.enabled", enabled)
        return self


class _DistributedOptions(_Freezable):
    def __init__(self):
        super().__init__(num_distributed_processes=1, distributed_process_id=0)

    def configureProcessId(self, process_id, num_processes):
        return self.set(distributed_process_id=process_id, num_distributed_processes=num_processes)

    @property
    def processId(self):
        return self.distributed_process_id

    @property
    def numProcesses(self):
        return self.num_distributed_processes


class TensorLocationSettings(_Freezable):
    def useOnChipStorage(self, use=True):
        assert isinstance(use, bool)
        return self.createOrSet(onChip=int(use))

    def useReplicatedTensorSharding(self, use=True):
        assert isinstance(use, bool)
        return self.createOrSet(useReplicatedTensorSharding=int(use))


class _TensorLocationOptions(_Freezable):
    def setOptimizerLocation(self, location):
        assert isinstance(location, TensorLocationSettings)
        return self.createOrSet(location_optimizer=location.toDict())


class PipelinedExecution:
    """Stages side by side."""

    def __init__(self, *args):
        assert len(args) <= 1 and all(isinstance(a, AutoStage) for a in args)
        self.auto_stage = args[0] if args else AutoStage.SameAsIpu


class ShardedExecution(PipelinedExecution):
    """Stages one after the other."""


class Options(_Freezable):
    def __init__(self):
        popart = _PopartOptions()
        self._popart = popart
        self.Precision = _PrecisionOptions(popart)
        self.Training = _TrainingOptions(popart)
        self.Distributed = _DistributedOptions()
        self.TensorLocations = _TensorLocationOptions()
        self._execution_strategy = PipelinedExecution()
        super().__init__(
            replication_factor=1,
            input_group_size=1,
            device_iterations=1,
            auto_round_num_ipus=False,
            output_mode=OutputMode.Default,
            connection_type=ConnectionType.Always,
            available_memory_proportion={},
            broadcast_buffers=True,
        )

    @property
    def _Popart(self):
        return self._popart

    def _parts(self):
        return [self._popart, self.Precision, self.Training, self.Distributed, self.TensorLocations]

    def _freeze(self, frozen=True):
        self._frozen = frozen
        for part in self._parts():
            part._frozen = frozen

    def clone(self):
        other = copy.deepcopy(self)
        other._freeze(False)
        return other

    def toDict(self):
        assert self.output_mode != OutputMode.Default, "An output mode must be chosen"
        result = {**self.values, **self.Training.values, **self.Distributed.values}
        return {**result, **self.TensorLocations.values, **self._popart.options}

    def autoRoundNumIPUs(self, auto_round_num_ipus=True):
        return self.set(auto_round_num_ipus=auto_round_num_ipus)

    def deviceIterations(self, device_iterations):
        return self.set(device_iterations=device_iterations)

    def replicationFactor(self, replication_factor):
        return self.set(replication_factor=replication_factor)

    def setExecutionStrategy(self, strategy):
        assert isinstance(strategy, PipelinedExecution)
        self._execution_strategy = strategy
        return self

    def setAvailableMemoryProportion(self, available_memory_proportion):
        assert all(name.startswith("IPU") for name in available_memory_proportion)
        numbers = {int(k[3:]): v for k, v in available_memory_proportion.items()}
        return self.set(available_memory_proportion=numbers)

    def outputMode(self, output_mode, output_return_period=None):
        assert isinstance(output_mode, OutputMode)
        return self.set(output_mode=output_mode)

    def broadcastBuffers(self, broadcast_buffers=True):
        return self.set(broadcast_buffers=broadcast_buffers)

    def defaultOutputMode(self):
        return self.output_mode == OutputMode.Default

    def randomSeed(self, random_seed):
        assert isinstance(random_seed, int)
        torch.manual_seed(random_seed)
        return self.createOrSet(random_seed=random_seed)

    def connectionType(self, connection_type):
        assert isinstance(connection_type, ConnectionType)
        return self.set(connection_type=connection_type)

    def useOfflineIpuTarget(self, ipu_version=2):
        self.connectionType(ConnectionType.Never)
        return self.createOrSet(ipu_version=ipu_version)

    def enableExecutableCaching(self, path):
        self._popart.set("enableEngineCaching", path is not None)
        if path is not None:
            self._popart.set("cachePath", path)
        return self

    def relaxOptimizerAttributesChecks(self, relax=True):
        return self
