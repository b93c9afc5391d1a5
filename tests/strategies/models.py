"""Small modules with their data: BERT and the language model, and what the tests know of them."""

import torch
from language_model import LanguageModel, Sentences

from lightning_ipu_bert import BertForQuestionAnsweringModule

UPDATES, GLOBAL_BATCH = 3, 16


class PlainBert(BertForQuestionAnsweringModule):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer)]


def span_batches(count):
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(1, 50, (count, 12), generator=generator)
    lengths = torch.randint(6, 13, (count, 1), generator=generator)
    positions = torch.randint(0, 6, (count, 2), generator=generator)
    mask = (torch.arange(12) < lengths).long()
    return [
        {
            "input_ids": tokens[i],
            "attention_mask": mask[i],
            "token_type_ids": (torch.arange(12) > 4).long(),
            "start_positions": positions[i, 0],
            "end_positions": positions[i, 1],
            "feature": torch.tensor(i),
        }
        for i in range(count)
    ]


def make_model(kind, updates=UPDATES, **changes):
    """A small module and its data; changes are arguments of BERT."""
    torch.manual_seed(3)
    if kind == "language model":
        return LanguageModel(), Sentences(updates * GLOBAL_BATCH)
    config = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 16,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return PlainBert(config=config, **changes), span_batches(updates * GLOBAL_BATCH)


ZERO = ("key.bias", "qa_outputs.bias", "layer.5.output.LayerNorm.bias")
"""Gradients of BERT that are mathematically zero; what is computed is rounding noise."""


def assert_equal(kind, values, truths, tolerance=1e-5):
    """Within a share of the norm of each tensor; noise is only as small as in the plain run."""
    for name, value in values.items():
        difference = (value - truths[name]).norm()
        if kind == "bert" and name.endswith(ZERO):
            assert difference < 1e-7, name
        else:
            assert difference <= tolerance * truths[name].norm(), name
