"""Fast layers beside those of transformers: equal, or off."""

import copy
import io

import pytest
import torch
from model_helpers import needs_pipelining
from torch import nn
from torch.func import functional_call, jvp, vmap
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer, BertModel, BertSelfAttention

from lightning_ipu_bert.models import fast_bert
from lightning_ipu_bert.models.fast_bert import FastBertLayer, use_fast_layers
from lightning_ipu_bert.models.fast_checks import layer_allows

pytestmark = needs_pipelining
SIZES = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def networks(**changes):
    """A BERT of transformers, and the same with fast layers, in float64."""
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(1)
    plain = BertModel(BertConfig(**{**SIZES, "intermediate_size": 32, **dropout, **changes}))
    plain = plain.double().train()
    fast = copy.deepcopy(plain)
    use_fast_layers(fast)
    return plain, fast


@pytest.fixture
def fast_runs(monkeypatch):
    """The layers that ran by our operations."""
    layers, run = [], fast_bert.run_fast

    def counted(layer, *args):
        layers.append(layer)
        return run(layer, *args)

    monkeypatch.setattr(fast_bert, "run_fast", counted)
    return layers


def hidden_states():
    torch.manual_seed(2)
    return torch.randn(3, 6, 16, dtype=torch.float64, requires_grad=True)


def padding_mask(kind):
    kept = (torch.arange(6) < torch.tensor([6, 4, 1])[:, None])[:, None, None]
    if kind == "bool":
        return kept
    if kind == "causal":
        kept = kept & torch.ones(6, 6).tril().bool()
    return torch.zeros(kept.shape).double().masked_fill(~kept, torch.finfo(torch.float64).min)


def run(network, *args, **kwargs):
    x = hidden_states()
    output = network.encoder.layer[0](x, *args, **kwargs)
    output = output[0] if isinstance(output, tuple) else output
    output.cumsum(-1).sum().backward()
    gradients = [p.grad for p in network.encoder.layer[0].parameters() if p.grad is not None]
    return [output.detach(), x.grad, *gradients]


def check_alike(plain, fast, *args, **kwargs):
    for one, other in zip(run(plain, *args, **kwargs), run(fast, *args, **kwargs)):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", [None, "bool", "additive", "causal"])
def test_outputs_and_gradients_are_those_of_transformers(attention, kind, fast_runs):
    if (attention, kind) == ("eager", "bool"):
        pytest.skip("the eager attention of transformers takes no boolean mask")
    plain, fast = networks(attn_implementation=attention)
    check_alike(plain, fast, None if kind is None else padding_mask(kind))
    assert len(fast_runs) == 1


def test_the_whole_model_is_that_of_transformers(fast_runs):
    plain, fast = networks()
    ids = torch.arange(18).view(3, 6)
    mask = (torch.arange(6) < torch.tensor([6, 4, 1])[:, None]).long()
    for network in (plain, fast):
        network(ids, attention_mask=mask).last_hidden_state.pow(3).sum().backward()
    for (name, one), (_, other) in zip(plain.named_parameters(), fast.named_parameters()):
        torch.testing.assert_close(one.grad, other.grad, msg=name)
    assert len(fast_runs) == 2


class Wrapped(nn.Linear):
    """Somebody's linear layer, as of an adapter."""

    def forward(self, x):
        return super().forward(x) * 2


def replace(layer, name, kind):
    part = layer.get_submodule(name)
    part.__class__ = kind


class OwnLayer(FastBertLayer):
    def forward(self, hidden_states, *args, **kwargs):
        return BertLayer.forward(self, hidden_states, *args, **kwargs) * 2


class Doubled(nn.Module):
    def forward(self, x):
        return x * 2


def own_activation(layer):
    layer.intermediate.intermediate_act_fn = nn.ReLU()


def untied_parameter(layer):
    weight = layer.output.dense.weight
    del layer.output.dense.weight
    layer.output.dense.weight = weight.detach() * 2


def extra_module(layer):
    layer.attention.output.adapter = nn.Identity()


def no_bias(layer):
    layer.output.dense.bias = None


def own_forward(layer):
    forward = layer.output.dense.forward
    layer.output.dense.forward = lambda x: forward(x) * 2


def own_chunk(layer):
    chunk = layer.feed_forward_chunk
    layer.feed_forward_chunk = lambda x: chunk(x) * 2


TOUCHED = {
    "forward hook": lambda x: x.output.dense.register_forward_hook(lambda m, i, o: o * 2),
    "forward pre-hook": lambda x: x.output.register_forward_pre_hook(lambda m, i: (i[0] * 2, i[1])),
    "backward hook": lambda x: x.intermediate.register_full_backward_hook(
        lambda m, i, o: (i[0] * 2,)
    ),
    "backward pre-hook": lambda x: x.attention.self.register_full_backward_pre_hook(
        lambda m, o: (o[0] * 2, *o[1:])
    ),
    "parametrization": lambda x: parametrize.register_parametrization(
        x.attention.self.query, "weight", Doubled()
    ),
    "weight norm": lambda x: parametrizations.weight_norm(x.output.dense),
    "spectral norm": lambda x: nn.utils.spectral_norm(x.output.dense),
    "pruning": lambda x: prune.l1_unstructured(x.attention.self.value, "weight", 0.5),
    "replaced linear layer": lambda x: replace(x, "attention.self.key", Wrapped),
    "own class of layer": lambda x: setattr(x, "__class__", OwnLayer),
    "own activation": own_activation,
    "tensor instead of a parameter": untied_parameter,
    "another part": extra_module,
    "no bias": no_bias,
    "own forward": own_forward,
    "own feed_forward_chunk": own_chunk,
    "chunks": lambda x: setattr(x, "chunk_size_feed_forward", 2),
    "scaling": lambda x: setattr(x.attention.self, "scaling", 0.1),
}


@pytest.mark.parametrize("touch", TOUCHED.values(), ids=TOUCHED)
def test_a_touched_layer_runs_as_that_of_transformers(touch, fast_runs):
    plain, fast = networks()
    for network in (plain, fast):
        torch.manual_seed(3)
        touch(network.encoder.layer[0])
    check_alike(plain, fast)
    assert not fast_runs


def test_a_layer_with_a_compiled_part_is_not_fast():
    _, fast = networks()
    layer = fast.encoder.layer[0]
    assert layer_allows(layer)
    layer.output.compile(backend="eager")
    assert not layer_allows(layer)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_stay(fast_runs):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(target_modules=["query", "value"], init_lora_weights=False)
    adapted = []
    for network in networks():
        torch.manual_seed(4)
        adapted.append(peft.get_peft_model(network, config).base_model.model)
    check_alike(*adapted)
    assert not fast_runs


def test_patched_classes_and_hooks_on_all_modules_are_seen(fast_runs, monkeypatch):
    plain, fast = networks()
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: output * 2 if isinstance(module, nn.Linear) else None
    )
    try:
        check_alike(plain, fast)
    finally:
        handle.remove()
    forward = BertSelfAttention.forward

    def patched(self, *args, **kwargs):
        output, weights = forward(self, *args, **kwargs)
        return output * 2, weights

    monkeypatch.setattr(BertSelfAttention, "forward", patched)
    plain, fast = networks()
    check_alike(plain, fast)
    assert not fast_runs


def test_other_inputs_run_as_in_transformers(fast_runs):
    plain, fast = networks()
    of_heads = torch.ones(3, 2, 6, 6).tril().bool()
    check_alike(plain, fast, of_heads)
    decoder = networks(is_decoder=True)
    check_alike(*decoder)
    pair = networks(attn_implementation="eager")
    outputs = [network(torch.arange(6)[None], output_attentions=True) for network in pair]
    torch.testing.assert_close(outputs[0].attentions, outputs[1].attentions)
    assert len(outputs[1].attentions) == 2
    assert not fast_runs


def test_other_attention_other_sizes_and_other_types_run_as_in_transformers(fast_runs):
    for network in networks(hidden_act="gelu_new"):
        run(network)
    _, fast = networks(attention_probs_dropout_prob=1.0)
    run(fast)
    _, fast = networks()
    with torch.autocast("cpu", torch.float16):
        fast.float().encoder.layer[0](hidden_states().float())
    assert fast.to("meta").encoder.layer[0](torch.empty(1, 2, 16, device="meta")).is_meta
    assert not fast_runs


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_traced_compiled_and_functional_calls_run_as_in_transformers(fast_runs):
    plain, fast = networks()
    x, expected = hidden_states().detach(), run(plain)[0]
    layer = fast.encoder.layer[0]
    torch.testing.assert_close(torch.jit.trace(layer, x, check_trace=False)(x), expected)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(x), expected)
    weights = {name: p.detach() * 1 for name, p in layer.named_parameters()}
    torch.testing.assert_close(functional_call(layer, weights, (x,)), expected)
    assert not fast_runs


def test_a_learned_mask_has_its_gradient(fast_runs):
    gradients = []
    for network in networks(attn_implementation="eager"):
        mask = torch.zeros(3, 1, 6, 6, dtype=torch.float64, requires_grad=True)
        network.encoder.layer[0](hidden_states(), mask).cumsum(-1).sum().backward()
        gradients.append(mask.grad)
    torch.testing.assert_close(*gradients)
    assert not fast_runs


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # of torch's own jvp
def test_transforms_and_forward_derivatives_run_as_in_transformers(fast_runs):
    (plain, fast), x = networks(attn_implementation="eager"), hidden_states().detach()
    layers = [network.encoder.layer[0] for network in (plain, fast)]
    torch.testing.assert_close(*(vmap(layer)(x[:, None]) for layer in layers))
    torch.testing.assert_close(*(jvp(layer, (x,), (x,)) for layer in layers))
    assert not fast_runs


def test_hooks_on_a_layer_fire(fast_runs):
    _, fast = networks()
    seen = []
    layer = fast.encoder.layer[0]
    layer.register_forward_pre_hook(lambda *args: seen.append("before"))
    layer.register_forward_hook(lambda *args: seen.append("after"))
    layer.register_full_backward_hook(lambda *args: seen.append("backward"))
    run(fast)
    assert seen == ["before", "after", "backward"]
    assert len(fast_runs) == 1


def test_parameters_keep_identity_and_names():
    plain, _ = networks()
    before = dict(plain.named_parameters())
    use_fast_layers(plain)
    assert list(plain.state_dict()) == list(networks()[0].state_dict())
    assert all(parameter is before[name] for name, parameter in plain.named_parameters())


def test_copies_and_files_of_modules_run_fast(fast_runs):
    _, fast = networks()
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    for other in (copy.deepcopy(fast), torch.load(file, weights_only=False)):
        check_alike(fast, other)
        fast.zero_grad()
    assert len(fast_runs) == 4


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_layers_repeat_their_masks(reentrant, fast_runs):
    results = []
    for recompute in (False, True):
        _, fast = networks(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
        layer, x = fast.encoder.layer[0], hidden_states()
        torch.manual_seed(5)
        output = checkpoint(layer, x, use_reentrant=reentrant) if recompute else layer(x)
        output.cumsum(-1).sum().backward()
        results.append([output, x.grad, *(p.grad for p in layer.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*results))
    assert len(fast_runs) == 3


def test_evaluation_has_no_dropout(fast_runs):
    _, fast = networks(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    with torch.no_grad():
        outputs = [fast.eval().encoder.layer[0](hidden_states()) for _ in range(2)]
    assert torch.equal(*outputs)
    assert len(fast_runs) == 2
