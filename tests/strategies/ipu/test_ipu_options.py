"""The exact calls that an IPU config makes, stated for the POD16."""

import json
import os

import poptorch
import pytest
import torch
import yaml

from lightning_ipu_bert import IPUConfig, IPUStrategy, UserError
from lightning_ipu_bert.commands.trainer_verbs import shipped_configs
from lightning_ipu_bert.strategies.ipu.profiling import profiled
from lightning_ipu_bert.strategies.ipu.program.options import OptionsContext, ipu_options


class Calls:
    """Options that only write down what is asked of them."""

    replication_factor = 4

    def __init__(self, log=None, path="", root=None):
        self._log, self._path, self._root = [] if log is None else log, path, root or self

    def __getattr__(self, name):
        return Calls(self._log, f"{self._path}.{name}".lstrip("."), self._root)

    def __call__(self, *args):
        self._log.append((self._path, *args))
        return self._root  # each call gives back the options


def pod16():
    text = (shipped_configs() / "bert_large_squad_pod16.yaml").read_text("utf8")
    given = yaml.safe_load(text)["trainer"]["strategy"]["init_args"]
    return IPUStrategy(**given).ipu_config


def calls_of(training, monkeypatch):
    calls = Calls()
    monkeypatch.setattr(poptorch, "Options", lambda: calls)
    monkeypatch.setattr(poptorch, "TensorLocationSettings", lambda: Locations())
    monkeypatch.setattr(poptorch, "PipelinedExecution", lambda auto: ("pipelined", auto.name))
    ipu_options(pod16(), training, OptionsContext(seed=42, initializers_file="weights.onnx"))
    return calls._log


class Locations:
    def __init__(self):
        self.given = {}

    def useOnChipStorage(self, use):  # noqa: N802
        self.given["on chip"] = use
        return self

    def useReplicatedTensorSharding(self, use):  # noqa: N802
        self.given["sharded"] = use
        return self

    def __eq__(self, other):
        return self.given == other


POPART = [
    ("_Popart.set", "saveInitializersToFile", "weights.onnx"),
    ("_Popart.set", "disableGradAccumulationTensorStreams", True),
    ("_Popart.set", "accumulateOuterFragmentSettings.schedule", 3),
    ("_Popart.set", "accumulateOuterFragmentSettings.excludedVirtualGraphs", ["0"]),
    ("_Popart.set", "outlineThreshold", 10.0),
    ("_Popart.set", "subgraphCopyingStrategy", 1),
    ("_Popart.set", "scheduleNonWeightUpdateGradientConsumersEarly", True),
    (
        "_Popart.setPatterns",
        {"TiedGather": True, "TiedGatherAccumulate": True, "UpdateInplacePrioritiesForIpu": True},
    ),
    (
        "_Popart.set",
        "engineOptions",
        {"opt.useAutoloader": "true", "target.syncReplicasIndependently": "true"},
    ),
]
PLACES = [
    ("randomSeed", 42),
    ("TensorLocations.setOptimizerLocation", {"on chip": False, "sharded": True}),
    ("setExecutionStrategy", ("pipelined", "AutoIncrement")),
    ("setAvailableMemoryProportion", {"IPU0": 0.15, "IPU1": 0.18, "IPU2": 0.2, "IPU3": 0.25}),
    ("enableExecutableCaching", "exe_cache"),
]


def test_the_calls_for_training_on_a_pod16(monkeypatch):
    assert calls_of(True, monkeypatch) == [
        ("replicationFactor", 4),
        ("autoRoundNumIPUs", False),
        ("deviceIterations", 1),
        ("Training.gradientAccumulation", 64),
        ("Training.accumulationAndReplicationReductionType", poptorch.ReductionType.Mean),
        ("outputMode", poptorch.OutputMode.Sum),
        *PLACES,
        ("Precision.enableStochasticRounding", True),
        ("Precision.setPartialsType", torch.float16),
        *POPART,
    ]


def test_the_calls_for_inference_on_a_pod16(monkeypatch):
    assert calls_of(False, monkeypatch) == [
        ("replicationFactor", 4),
        ("autoRoundNumIPUs", False),
        ("deviceIterations", 4),
        ("outputMode", poptorch.OutputMode.All),
        *PLACES,
        ("Precision.enableStochasticRounding", False),
        ("Precision.setPartialsType", torch.float16),
        *POPART,
    ]


def test_pod16_is_the_tutorials_recipe():
    config = pod16()
    training, inference = config.training, config.inference
    calls = [program.shape.batches.micro_batches_per_call for program in (training, inference)]
    assert (training.shape.num_devices, calls[0]) == (16, 256)
    assert 88_524 // 256 == 345
    assert (inference.shape.num_devices, 2 * calls[1]) == (16, 32)
    assert 10_784 / 32 == 337


def options(training=True, context=None, **values):
    return ipu_options(IPUConfig.from_dict(values), training, context)


def test_options_are_made_without_a_trace_on_the_host():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    options(seed=3)
    assert (torch.get_rng_state() == before).all()


def test_what_is_asked_for_by_option():
    popart = options(auto_loss_scaling=True)._Popart.options
    assert popart["automaticLossScalingSettings.enabled"] is True
    assert options(decompose_grad_sum=True)._Popart.options["decomposeGradSum"] is True
    sharded = options(False, sharded_execution_for_inference=True)
    assert type(sharded._execution_strategy) is poptorch.ShardedExecution
    explicit = options(False, explicit_ir_inference=True)
    assert explicit._Popart.options["enableExplicitIR"] is True
    assert options(context=OptionsContext(offline=True)).connection_type == (
        poptorch.ConnectionType.Never
    )
    assert "cachePath" not in options(executable_cache_dir="disabled")._Popart.options
    assert options(context=OptionsContext(auto_round_num_ipus=True)).auto_round_num_ipus
    assert not options().exists("random_seed")
    assert options(seed=0).random_seed == 0


def test_one_replica_shares_nothing():
    locations = options(replicated_tensor_sharding=True).toDict()
    assert locations["location_optimizer"]["useReplicatedTensorSharding"] == 0


# --- profiling ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "before", [None, '{"debug.instrument": "true", "autoReport.all": "false"}']
)
def test_profiling_extends_the_engine_options_and_leaves_them_as_they_were(before, monkeypatch):
    monkeypatch.delenv("POPLAR_ENGINE_OPTIONS", raising=False)
    if before:
        monkeypatch.setenv("POPLAR_ENGINE_OPTIONS", before)
    with profiled("reports"):
        found = json.loads(os.environ["POPLAR_ENGINE_OPTIONS"])
        assert found["autoReport.directory"] == "reports"
        assert found["autoReport.all"] == ("false" if before else "true")
        assert ("debug.instrument" in found) == bool(before)
    assert os.environ.get("POPLAR_ENGINE_OPTIONS") == before
    with profiled(""):
        assert os.environ.get("POPLAR_ENGINE_OPTIONS") == before


def test_engine_options_that_cannot_be_extended_are_refused(monkeypatch):
    monkeypatch.setenv("POPLAR_ENGINE_OPTIONS", "autoReport.all=true")
    with pytest.raises(UserError, match="is not a JSON object"), profiled("reports"):
        pass
