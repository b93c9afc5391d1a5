"""Batches, hidden states and outputs of any structure, beside one process."""

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from model_helpers import make_trainer, needs_pipelining
from projects import (
    BATCH,
    PLANS,
    Project,
    assert_alike,
    fit,
    fit_ranks,
    loader_of,
    table,
)
from ranks import run_ranks
from torch.utils.data import DataLoader
from transformers import BatchEncoding

pytestmark = [pytest.mark.slow, needs_pipelining]
SPLIT = ["2x1", "2x2"]


# --- hidden states --------------------------------------------------------------------------------


class Hiding(Project):
    """Subclasses change what the first layer passes to the second one, and back."""

    def stage_forward(self, blocks, hidden, batch):
        for name in blocks:
            layer = self.get_submodule(name)
            if name == "layers.0":
                hidden = self.hide(torch.tanh(layer(batch["x"])))
            else:
                hidden = torch.tanh(layer(self.unhide(hidden)))
        return hidden

    def hide(self, hidden):
        return hidden

    def unhide(self, hidden):
        return hidden


class Transposed(Hiding):
    """Images as sequences; the gradient is not contiguous either."""

    def hide(self, hidden):
        return hidden.reshape(len(hidden), 2, 3, 1).flatten(2).transpose(1, 2)

    def unhide(self, hidden):
        return hidden.transpose(1, 2).flatten(1)


class Chunked(Hiding):
    def hide(self, hidden):
        return hidden.chunk(2, dim=1)

    def unhide(self, hidden):
        return torch.cat([hidden[1], hidden[0]], 1)


class Expanded(Hiding):
    def hide(self, hidden):
        return hidden[:, :1].expand(len(hidden), 6), hidden[:, ::2]

    def unhide(self, hidden):
        return hidden[0] + hidden[1].mean(1, keepdim=True)


class Named(Hiding):
    """A dictionary, with a mask, a number and nothing."""

    def hide(self, hidden):
        mask = hidden[:, 0] > 0
        return {"h": hidden, "mask": mask, "ids": mask.long(), "none": None, "size": 6}

    def unhide(self, hidden):
        assert hidden["none"] is None
        assert hidden["size"] == 6
        return hidden["h"] * (1 + hidden["mask"][:, None].float() + hidden["ids"][:, None])


class OneTuple(Hiding):
    def hide(self, hidden):
        return (hidden,)

    def unhide(self, hidden):
        (single,) = hidden
        return single


class Pair(NamedTuple):
    h: torch.Tensor
    other: object


@dataclass(frozen=True)
class State:
    h: torch.Tensor
    parts: tuple


class Nested(Hiding):
    def hide(self, hidden):
        return Pair(hidden, [State(hidden * 2, (None, hidden[:, :1]))])

    def unhide(self, hidden):
        assert isinstance(hidden, Pair)
        (state,) = hidden.other
        return hidden.h + state.h * state.parts[1]


class InPlace(Hiding):
    def hide(self, hidden):
        return hidden * 2  # whose own output is not needed for its gradient

    def unhide(self, hidden):
        return hidden.add_(1.0).mul_(0.5)


class Nothing(Hiding):
    """The second stage uses the batch only."""

    def hide(self, hidden):
        return None

    def unhide(self, hidden):
        assert hidden is None
        return hidden

    def stage_forward(self, blocks, hidden, batch):
        for name in blocks:
            layer = self.get_submodule(name)
            if name == "layers.0":
                layer(batch["x"])
                hidden = None
            else:
                hidden = layer(batch["x"].repeat(1, 2)[:, :6])
        return hidden


KINDS = [Transposed, Chunked, Expanded, Named, OneTuple, Nested, InPlace, Nothing]


CASES = [
    (plan, kind)
    for plan in ("2x1", "2x2", "zero_bubble", "recomputed")
    for kind in KINDS
    if (plan != "2x2" or kind in (Transposed, Named))
    and (plan, kind) != ("zero_bubble", Nothing)  # whose second stage has no input to split for
]


@pytest.mark.parametrize(("plan", "kind"), CASES)
def test_hidden_states_of_any_structure_train_as_in_one_process(plan, kind, tmp_path):
    assert_alike(fit_ranks(plan, tmp_path, kind), fit("auto", tmp_path, kind))


class Changing(Hiding):
    def hide(self, hidden):
        return hidden, float(hidden.detach().sum())

    def unhide(self, hidden):
        return hidden[0] * hidden[1]


class Custom(Hiding):
    def hide(self, hidden):
        return hidden, object()

    def unhide(self, hidden):
        return hidden[0]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Changing, r"returns hidden states\[1\] with .* for this micro-batch, but -?\d"),
        (Custom, "returns an object of type object, which cannot be sent"),
    ],
)
@pytest.mark.usefixtures("short_grace")
def test_hidden_states_that_the_next_stage_cannot_have_are_refused(kind, message, tmp_path):
    with pytest.raises(AssertionError, match=f"UserError: .*{message}"):
        fit_ranks("2x1", tmp_path, kind)


# --- outputs --------------------------------------------------------------------------------------


class Output(Project):
    """Subclasses return something else than a tensor of examples."""

    def stage_forward(self, blocks, hidden, batch):
        hidden = super().stage_forward(blocks, hidden, batch)
        return self.shaped(hidden) if "layers.1" in blocks else hidden

    def pipeline_loss(self, output, batch):
        return super().pipeline_loss(self.plain(output), batch)

    def training_step(self, batch, batch_idx):
        loss, output = self.run_loss(batch, return_output=True)
        self.losses.append((float(loss.detach()), output))
        return loss

    def predict_step(self, batch, batch_idx):
        return self.run_output(batch)


class TimeFirst(Output):
    """[T, B] with as many time steps as there are examples in a micro-batch."""

    def shaped(self, hidden):
        return torch.cat([hidden.T, hidden.T[:1]])

    def plain(self, output):
        return output[:3].T


class Records(Output):
    def shaped(self, hidden):
        return {"y": hidden, "none": None, "mean": hidden.mean(), "one": (hidden[:, 0],)}

    def plain(self, output):
        return output["y"]


class SingleOutput(Output):
    def shaped(self, hidden):
        return (hidden,)

    def plain(self, output):
        return output[0]


def predictions(name, folder, kind):
    trainer = make_trainer(folder, plan=PLANS.get(name))
    return trainer.predict(kind(), loader_of(name, trainer, table(16)))


def assert_same(one, other):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [TimeFirst, Records, SingleOutput])
def test_outputs_of_any_structure(kind, tmp_path):
    expected = predictions("auto", tmp_path, kind)
    for found in run_ranks(2, predictions, "2x1", tmp_path, kind):
        assert_same(found, expected)


@pytest.mark.parametrize("kind", [TimeFirst, Records, SingleOutput])
def test_outputs_in_training_are_those_of_the_loss(kind, tmp_path):
    expected, _, _ = fit("auto", tmp_path, kind)
    for found, _, _ in fit_ranks("2x1", tmp_path, kind):
        assert_same(found, expected)
        tensors = [x for _, out in found for x in torch.utils._pytree.tree_flatten(out)[0]]
        assert not any(x.requires_grad for x in tensors if x is not None)


def test_outputs_in_training_are_those_of_a_replica(tmp_path):
    expected, _, _ = fit("auto", tmp_path, SingleOutput)
    ranks = fit_ranks("2x2", tmp_path, SingleOutput)
    assert_same([out for _, out in ranks[0][0]], [out for _, out in ranks[1][0]])
    for (_, (whole,)), (_, (first,)), (_, (second,)) in zip(expected, ranks[0][0], ranks[2][0]):
        assert_same(torch.stack([first, second], 1).flatten(0, 1), whole)


# --- batches --------------------------------------------------------------------------------------


@dataclass
class Batch:
    x: torch.Tensor
    y: torch.Tensor


class Columns(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


def encoded(rows):
    columns = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return BatchEncoding(columns)


COLLATORS = {
    "encoding": (encoded, lambda batch: batch),
    "dataclass": (lambda rows: Batch(**encoded(rows)), lambda b: {"x": b.x, "y": b.y}),
    "named tuple": (lambda rows: Columns(**encoded(rows)), lambda b: {"x": b.x, "y": b.y}),
    "nested tuples": (
        lambda rows: ((encoded(rows)["x"], (encoded(rows)["x"],)), encoded(rows)["y"]),
        lambda b: {"x": b[0][0] + 0 * b[0][1][0], "y": b[1]},
    ),
    "tensors of examples": (
        lambda rows: {"x": [row["x"] for row in rows], "y": encoded(rows)["y"]},
        lambda b: {"x": torch.stack(b["x"]), "y": b["y"]},
    ),
    "ragged tensors of examples": (
        lambda rows: {
            "x": [row["x"].repeat(1 + i % 3) for i, row in enumerate(rows)],
            "y": [row["y"] for row in rows],
        },
        lambda b: {"x": torch.stack([x[:4] for x in b["x"]]), "y": torch.stack(b["y"])},
    ),
    "ragged tuple": (
        lambda rows: (
            tuple(row["x"].repeat(1 + i % 3) for i, row in enumerate(rows))
            and (
                [
                    torch.cat([row["x"], row["y"][None], row["x"][: i % 3]])
                    for i, row in enumerate(rows)
                ]
            )
        ),
        lambda b: {
            "x": torch.stack([x[:4] for x in b]),
            "y": torch.stack([x[4] for x in b]).long(),
        },
    ),
    "rows": (
        lambda rows: list(rows),
        lambda b: {"x": torch.stack([r["x"] for r in b]), "y": torch.stack([r["y"] for r in b])},
    ),
}


class Reading(Project):
    collator = "encoding"

    def stage_forward(self, blocks, hidden, batch):
        return super().stage_forward(blocks, hidden, COLLATORS[self.collator][1](batch))

    def pipeline_loss(self, output, batch):
        return super().pipeline_loss(output, COLLATORS[self.collator][1](batch))

    def train_dataloader(self):
        replicas = (self.trainer.distributed_sampler_kwargs or {"num_replicas": 1})["num_replicas"]
        share = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        sampler = torch.utils.data.DistributedSampler(self.examples, shuffle=False, **share)
        collate = COLLATORS[self.collator][0]
        return DataLoader(self.examples, BATCH // replicas, sampler=sampler, collate_fn=collate)


def fit_collated(name, folder, collator):
    module = Reading()
    module.collator, module.examples = collator, table(28)  # the last batch is ragged
    trainer = make_trainer(folder, plan=PLANS.get(name), max_epochs=1)
    trainer.fit(module)
    return module.losses, {key: value.clone() for key, value in module.state_dict().items()}, None


@pytest.mark.parametrize("collator", COLLATORS)
@pytest.mark.parametrize("plan", SPLIT)
def test_batches_of_any_structure_train_as_in_one_process(plan, collator, tmp_path):
    runs = run_ranks(2 * int(plan[-1]), fit_collated, plan, tmp_path, collator)
    assert_alike(runs, fit_collated("auto", tmp_path, collator))
