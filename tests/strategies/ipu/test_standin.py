"""The stand-in is as strict as PopTorch: users' mistakes fail in it as on the real one."""

import poptorch
import pytest
import torch
from poptorch import device, optim
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss


class Net(nn.Module):
    """Two layers on two IPUs."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.first = poptorch.BeginBlock(nn.Linear(4, 8), "first", ipu_id=0)
        self.second = poptorch.BeginBlock(nn.Linear(8, 3), "second", ipu_id=1)
        self.dropout = nn.Dropout(dropout)
        self.traced = 0

    def forward(self, x, target=None):
        self.first.traced = getattr(self.first, "traced", 0) + 1
        hidden = self.dropout(self.first(x).relu())
        output = self.second(hidden)
        return output if target is None else (output, cross_entropy(output, target))


def options(steps=3, replicas=1, iterations=1, mode=None):
    result = poptorch.Options().replicationFactor(replicas).deviceIterations(iterations)
    result.Training.gradientAccumulation(steps)
    return result if mode is None else result.outputMode(mode)


def data(count):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 4, generator=generator)
    return x, torch.randint(0, 3, (count,), generator=generator)


def adamw(model, **changes):
    return optim.AdamW(model.parameters(), **{"lr": 0.01, **changes})


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("used_by", ["executor", "loader"])
def test_options_freeze_once_they_are_used(used_by):
    frozen = options()
    if used_by == "executor":
        poptorch.trainingModel(Net(), frozen)
    else:
        poptorch.DataLoader(frozen, [1, 2, 3])
    for change in (
        lambda: frozen.deviceIterations(2),
        lambda: frozen.Training.gradientAccumulation(2),
        lambda: frozen._Popart.set("outlineThreshold", 1.0),
    ):
        with pytest.raises(AttributeError, match="Can't modify frozen Options"):
            change()
    frozen.clone().deviceIterations(2)


def test_options_that_there_are_none_of_cannot_be_set():
    with pytest.raises(AssertionError, match="Invalid option micro_batches"):
        options().micro_batches = 3
    with pytest.raises(AssertionError, match="Unexpected type"):
        options().deviceIterations("2")


# --- tracing --------------------------------------------------------------------------------------


def test_python_runs_once_and_its_numbers_are_frozen():
    class Counting(Net):
        factor = 1.0

        def forward(self, x):
            self.first.traced = getattr(self.first, "traced", 0) + 1
            return self.second(self.first(x)) * self.first.traced

    model = Counting()
    inference = poptorch.inferenceModel(model, options(1, iterations=2))
    x, _ = data(2)
    once, twice = inference(x), inference(x)
    assert (once == twice).all()  # 1 and not 2 times
    assert model.first.traced == 1


MISTAKES = {
    "batch_idx as an argument": (lambda x, n: x * 2, (0,), (1,), "Value mismatch"),
    ".item() in the graph": (lambda x, n: x * x.sum().item(), (0,), None, "needs the value"),
    "a branch on a tensor": (lambda x, n: x if x.sum() > 0 else -x, (0,), None, "needs the value"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_forward_fail(mistake):
    function, first, second, message = MISTAKES[mistake]

    class Wrong(nn.Module):
        def forward(self, x, n):
            return function(x, n)

    inference = poptorch.inferenceModel(Wrong())
    numbers = first if second is None else second
    if second is not None:
        inference(torch.ones(2), *first)
    with pytest.raises(poptorch.Error, match=message):
        inference(torch.ones(2), *numbers)


def test_other_shapes_than_the_compiled_fail():
    inference = poptorch.inferenceModel(Net(), options(1, iterations=2))
    x, _ = data(4)
    inference(x)
    with pytest.raises(poptorch.Error, match="Shape mismatch"):
        inference(x[:2])
    with pytest.raises(poptorch.Error, match="Shape mismatch"):
        inference(x.double())


def test_a_batch_must_part_into_its_micro_batches():
    inference = poptorch.inferenceModel(Net(), options(1, iterations=2))
    with pytest.raises(poptorch.Error, match="must be a multiple of 2"):
        inference(data(3)[0])


# --- pipelines and IPUs ---------------------------------------------------------------------------


def test_pipelines_must_be_filled():
    model = Net()
    training = poptorch.trainingModel(model, options(2), adamw(model))
    with pytest.raises(poptorch.Error, match=r"number of pipeline stages \(3\)"):
        training(*data(2))
    with pytest.raises(poptorch.Error, match=r"number of pipeline stages \(2\)"):
        poptorch.inferenceModel(Net())(data(1)[0])
    sharded = poptorch.Options().setExecutionStrategy(poptorch.ShardedExecution())
    poptorch.inferenceModel(Net(), sharded)(data(1)[0])


def test_ipus_can_run_out_and_come_back(ipus):
    ipus.size = 2
    x, _ = data(2)
    one = poptorch.inferenceModel(Net(), options(1, iterations=2))
    two = poptorch.inferenceModel(Net(), options(1, iterations=2))
    one(x)
    with pytest.raises(poptorch.Error, match=r"Failed to acquire 2 IPU\(s\)"):
        two(x)
    one.detachFromDevice()
    two(x)
    two.destroy()
    one(x)
    one.destroy()
    assert ipus.held == 0


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", [poptorch.ReductionType.Mean, poptorch.ReductionType.Sum])
def test_updates_are_those_of_torch_over_all_micro_batches(reduction):
    torch.manual_seed(0)
    model, reference = Net(), Net()
    reference.load_state_dict(model.state_dict())
    chosen = options(3, replicas=2, iterations=2)
    chosen.Training.accumulationAndReplicationReductionType(reduction)
    training = poptorch.trainingModel(model, chosen, adamw(model, weight_decay=0.1))
    x, y = data(24)
    training(x, y)
    plain = torch.optim.AdamW(reference.parameters(), lr=0.01, weight_decay=0.1)
    for half in (slice(0, 12), slice(12, 24)):
        plain.zero_grad()
        loss = reference(x[half], y[half])[1]
        (loss * (6 if reduction == poptorch.ReductionType.Sum else 1)).backward()
        plain.step()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, reference.state_dict()[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("mode", "shape"), [("Final", (2,)), ("Sum", (2,)), ("All", (12,)), ("Default", (2,))]
)
def test_results_by_output_mode(mode, shape):
    model = Net()
    chosen = options(3, 2, 2, getattr(poptorch.OutputMode, mode))
    training = poptorch.trainingModel(model, chosen, adamw(model))
    output, loss = training(*data(24))
    assert loss.shape == shape
    rows = {"All": 24}.get(mode, 4)
    assert output.shape == (rows, 3)
    with pytest.raises(poptorch.Error, match=r"backward\(\) cannot be called"):
        loss.backward()
    assert all(p.grad is None for p in model.parameters())


def test_integers_come_back_as_int32():
    class Number(nn.Module):
        def forward(self, x):
            return x + 1, x.double()

    found = poptorch.inferenceModel(Number())(torch.tensor([1, 2]))
    assert [t.dtype for t in found] == [torch.int32, torch.float32]


def test_a_loss_is_needed_and_one_only():
    class Nothing(nn.Linear):
        def forward(self, x):
            return super().forward(x).sum()

    class Two(nn.Linear):
        def forward(self, x):
            return mse_loss(super().forward(x), x), mse_loss(super().forward(x), 2 * x)

    for kind, message in ((Nothing, "Couldn't find a loss"), (Two, "Multiple independent losses")):
        model = kind(4, 4)
        with pytest.raises(poptorch.Error, match=message):
            poptorch.trainingModel(model, optimizer=adamw(model))(torch.ones(1, 4))


def test_what_follows_the_last_loss_does_not_change_gradients():
    class Halved(Net):
        def forward(self, x, target):
            return 0.5 * super().forward(x, target)[1]

    class Wrapped(Halved):
        def forward(self, x, target):
            return poptorch.identity_loss(super().forward(x, target), "none")

    found = []
    for kind in (Net, Halved, Wrapped):
        torch.manual_seed(0)
        model = kind()
        sgd = optim.SGD(model.parameters(), lr=1.0)
        poptorch.trainingModel(model, options(3), sgd)(*data(3))
        found.append(model.state_dict()["second.bias"])
    torch.testing.assert_close(found[0], found[1])
    assert (found[0] != found[2]).any()


# --- weights and optimizers -----------------------------------------------------------------------


def test_weights_travel_when_somebody_looks_and_only_then():
    model = Net()
    training = poptorch.trainingModel(model, options(3), adamw(model))
    for _ in range(3):
        training(*data(3))
    assert device.COUNTS["to_host"] == 0
    model.first.weight.shape  # noqa: B018
    model.first.weight.grad  # noqa: B018
    assert device.COUNTS["to_host"] == 1
    with torch.no_grad():
        model.first.weight.zero_()  # lost: nobody sends it
    training(*data(3))
    assert (model.state_dict()["first.weight"] != 0).all()


def test_a_number_left_out_is_a_constant():
    model = Net()
    optimizer = optim.AdamW(model.parameters())
    training = poptorch.trainingModel(model, options(3), optimizer)
    training(*data(3))
    optimizer.param_groups[0]["lr"] = 0.5
    with pytest.raises(poptorch.Error, match="Values are constant but do not match"):
        training.setOptimizer(optimizer)
    optimizer = adamw(Net())
    assert not optimizer.variable_attrs.isConstant("lr")
    assert optimizer.variable_attrs.isConstant("betas")


def test_a_new_rate_counts_when_it_is_set():
    model = Net()
    optimizer = optim.SGD(model.parameters(), lr=0.0)
    training = poptorch.trainingModel(model, options(3), optimizer)
    training(*data(3))
    before = model.state_dict()["first.weight"].clone()
    optimizer.param_groups[0]["lr"] = 0.5
    training(*data(3))
    assert (model.state_dict()["first.weight"] == before).all()
    training.setOptimizer(optimizer)
    training(*data(3))
    assert (model.state_dict()["first.weight"] != before).any()


def test_torchs_own_optimizer_loses_its_state_when_ipus_change_hands():
    found = []
    for kind in (optim.AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        model = Net()
        training = poptorch.trainingModel(model, options(3), kind(model.parameters(), lr=0.01))
        training(*data(3))
        training.detachFromDevice()
        training(*data(3))
        steps = [v for k, v in training._optimizer_state.items() if k.startswith("Step")]
        found.append(len(steps) and float(steps[0]))
    assert found[0] == 2.0
    assert found[1] != 2.0


def test_state_with_wrong_bytes_is_not_taken():
    model = Net()
    optimizer = adamw(model)
    training = poptorch.trainingModel(model, options(3), optimizer)
    training(*data(3))
    state = optimizer.state_dict()
    state["ipu_state"]["Step___first.bias"] = torch.tensor(1.0, dtype=torch.float64)
    optimizer.load_state_dict(state)
    with pytest.raises(AssertionError, match="wrong bytes"):
        training(*data(3))
    with pytest.raises(RuntimeError, match="Only IPU optimizer states"):
        optimizer.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())


def test_random_numbers_go_on_from_a_state():
    model = Net(dropout=0.5)
    chosen = options(24, mode=poptorch.OutputMode.Sum).randomSeed(3)
    training = poptorch.trainingModel(model, chosen, optim.SGD(model.parameters(), lr=0.0))
    training(*data(24))
    state = training.rng_state
    first, second = (training(*data(24))[1] for _ in range(2))
    assert first != second
    training.rng_state = state
    assert training(*data(24))[1] == first
    with pytest.raises(poptorch.Error, match="was expecting size"):
        training.rng_state = state[:-1]


def test_inference_refuses_accumulation():
    with pytest.raises(poptorch.Error, match="gradientAccumulation to 1"):
        poptorch.inferenceModel(Net(), options(3))


def test_a_module_is_wrapped_once():
    model = Net()
    training = poptorch.trainingModel(model, options(3), adamw(model))
    with pytest.raises(RuntimeError, match="already been wrapped"):
        poptorch.trainingModel(model, options(3), adamw(model))
    training(*data(3))
    training.destroy()
    assert type(model) is Net
    poptorch.trainingModel(model, options(3), adamw(model))


def test_offline_targets_compile_and_do_not_run():
    model = Net()
    training = poptorch.trainingModel(model, options(3).useOfflineIpuTarget(), adamw(model))
    training.compile(*data(3))
    assert training.isCompiled()
    assert not training.isAttachedToDevice()
    with pytest.raises(AssertionError, match="offline device"):
        training(*data(3))


def test_a_block_is_a_block_once():
    with pytest.raises(poptorch.Error, match="already been assigned to a block"):
        poptorch.BeginBlock(Net().first, "again", ipu_id=0)
