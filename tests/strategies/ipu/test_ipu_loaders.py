"""Loaders for IPUs: whole calls, in the order of the user's loader, in every mode."""

import poptorch
import pytest
import torch
from language_model import Sentences
from torch.utils.data import DataLoader, IterableDataset

from lightning_ipu_bert import IPUConfig, UserError
from lightning_ipu_bert.data.loaders import ResumableDataLoader, TrainingSampler
from lightning_ipu_bert.strategies.ipu.loaders import ipu_loader

TRAINING = IPUConfig.from_dict({"gradient_accumulation_steps": 4, "replication_factor": 2})
EVALUATION = IPUConfig.from_dict(
    {"inference_device_iterations": 3, "inference_replication_factor": 2}
)
MODES = ["sync", "async", "async_rebatched"]


def options(program):
    batches = program.shape.batches
    result = poptorch.Options().replicationFactor(batches.replication_factor)
    result.deviceIterations(batches.device_iterations)
    result.Training.gradientAccumulation(batches.gradient_accumulation_steps)
    return result


def convert(loader, program, mode="sync"):
    return ipu_loader(loader, options(program), program, 4, mode)


def tokens(loader):
    return [batch["tokens"] for batch in loader]


@pytest.mark.parametrize("mode", MODES)
def test_training_takes_whole_calls_and_drops_the_rest(mode):
    data = Sentences(70)
    found = convert(DataLoader(data, batch_size=8), TRAINING.training, mode)
    assert isinstance(found, poptorch.DataLoader)
    assert found.combinedBatchSize == 16  # 2 x 4 micro-batches x 2 replicas
    assert len(found) == 4
    batches = tokens(found)
    assert [len(b) for b in batches] == [16] * 4
    assert (torch.cat(batches) == data.tokens[:64]).all()
    assert (torch.cat(tokens(found)) == data.tokens[:64]).all()  # again


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_keeps_every_example(mode):
    data = Sentences(70)
    found = convert(DataLoader(data, batch_size=8), EVALUATION.inference, mode)
    assert found.combinedBatchSize == 12
    assert [len(b) for b in tokens(found)] == [12] * 5 + [10]
    assert (torch.cat(tokens(found)) == data.tokens).all()


@pytest.mark.parametrize("mode", MODES)
def test_every_epoch_has_its_own_order_and_can_begin_in_the_middle(mode):
    data = Sentences(64)

    def make(state=None):
        sampler = TrainingSampler([13] * 64, 8)
        # As the data module makes it: with a generator, which cannot go to another process.
        generator = torch.Generator()
        loader = ResumableDataLoader(data, batch_size=8, sampler=sampler, generator=generator)
        if state:
            loader.load_state_dict(state)
        return convert(loader, TRAINING.training, mode)

    whole = make()
    epochs = []
    for epoch in range(2):
        whole.sampler.set_epoch(epoch)
        epochs.append(torch.cat(tokens(whole)))
    assert (epochs[0] != epochs[1]).any()
    for epoch in range(2):
        order = TrainingSampler([13] * 64, 8)
        order.set_epoch(epoch)
        assert (epochs[epoch] == data.tokens[list(order)]).all()

    iterator = iter(whole)
    next(iterator)
    assert whole.state_dict() == {"epoch": 1, "batches": 1}
    resumed = make({"epoch": 0, "batches": 1})
    resumed.sampler.set_epoch(0)
    assert (torch.cat(tokens(resumed)) == epochs[0][16:]).all()
    resumed.sampler.set_epoch(1)
    assert (torch.cat(tokens(resumed)) == epochs[1]).all()


def test_batches_of_a_process_of_its_own_can_be_kept():
    found = convert(DataLoader(Sentences(64), batch_size=8), TRAINING.training, "async")
    batches = tokens(found)
    assert (batches[0] != batches[1]).any()


class Pairs:
    """A custom batch sampler with only the methods that torch requires."""

    def __init__(self, count, **attributes):
        self.batches = [[i, count - 1 - i] for i in range(count // 2)]
        vars(self).update(attributes)

    def __iter__(self):
        return iter(self.batches)


class SizedPairs(Pairs):
    batch_size, epoch = 2, 0

    def __len__(self):
        return len(self.batches)

    def set_epoch(self, epoch):
        self.epoch = epoch


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pairs", [Pairs(64, batch_size=2), SizedPairs(64)])
def test_a_batch_sampler_gives_micro_batches(pairs, mode):
    data = Sentences(64)
    found = convert(DataLoader(data, batch_sampler=pairs, num_workers=1), TRAINING.training, mode)
    order = [i for pair in pairs.batches for i in pair]
    assert [len(batch) for batch in tokens(found)] == [16] * 4
    assert (torch.cat(tokens(found)) == data.tokens[order]).all()
    found.sampler.set_epoch(3)
    if isinstance(pairs, SizedPairs):
        assert len(found) == 4
        assert pairs.epoch == 3


def test_a_batch_sampler_must_know_its_size():
    with pytest.raises(UserError, match="The batch sampler Pairs has batch_size=None"):
        convert(DataLoader(Sentences(64), batch_sampler=Pairs(64)), TRAINING.training)


class Noise(torch.utils.data.Dataset):
    """Every example is a random number of its worker, and where it stands."""

    def __len__(self):
        return 32

    def __getitem__(self, index):
        return {"tokens": torch.stack([torch.rand(()), torch.tensor(float(index))])}


@pytest.mark.parametrize("mode", MODES)
def test_one_seed_gives_one_order_and_one_noise(mode):
    def epochs(seed):
        torch.manual_seed(seed)
        loader = DataLoader(Noise(), batch_size=8, shuffle=True, num_workers=1)
        found = convert(loader, TRAINING.training, mode)
        return [torch.cat(tokens(found)) for _ in range(2)]

    first, again, other = epochs(1), epochs(1), epochs(2)
    assert all((a == b).all() for a, b in zip(first, again))
    for a, b in ((first[0], first[1]), (first[0], other[0])):
        assert (a[:, 0] != b[:, 0]).all()
        assert (a[:, 1] != b[:, 1]).any()


def test_streams_are_loaded_too():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([{"tokens": row} for row in Sentences(40).tokens])

    found = convert(DataLoader(Stream(), batch_size=8), TRAINING.training)
    assert [len(b) for b in tokens(found)] == [16, 16]


def test_poptorchs_own_loader_and_what_is_none_are_left_alone():
    own = poptorch.DataLoader(options(TRAINING.training), Sentences(64), batch_size=2)
    assert convert(own, TRAINING.training) is own
    assert convert([1, 2], TRAINING.training) == [1, 2]


def test_batches_that_do_not_part_are_refused():
    with pytest.raises(UserError, match=r"batch_size=6 .* a multiple of 4, e\.g\. batch_size=8"):
        convert(DataLoader(Sentences(64), batch_size=6), TRAINING.training)
