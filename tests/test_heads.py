"""The output head, read out of a model: its logits must be the model's own, or the model must be refused."""

from __future__ import annotations

import pytest
import torch
from architectures import VOCABULARY, tiny
from conftest import make_model
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn

from hfkd.batch import IGNORE, View
from hfkd.errors import HeadError
from hfkd.objective import build_objective
from hfkd.rows import DenseRows, Head, base_model_of, decode, supervised
from hfkd.signal import TeacherSignal
from hfkd.student import check_head

# Model type, scale, soft cap, bias: what must be read out of each.
KNOWN = [
    ("llama", 1.0, None, False),
    ("granite", 0.25, None, False),
    ("cohere", 0.25, None, False),
    ("gemma2", 1.0, 1.5, False),
    ("gemma3_text", 1.0, 1.5, False),
    ("falcon_h1", 3.0, None, False),
    ("minicpm3", 0.25, None, False),
    ("hyperclovax", 4.0, None, False),
    ("gpt2", 1.0, None, False),
    ("gptj", 1.0, None, True),
    ("phi", 1.0, None, True),
]
every_architecture = pytest.mark.parametrize(("model_type", "scale", "soft_cap", "bias"), KNOWN, ids=lambda x: str(x))


def some_view(rows: int = 2, length: int = 9, vocabulary: int = VOCABULARY) -> View:
    """Random ids without padding; the second half of each row is learned."""
    ids = torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(7))
    labels = torch.where(torch.arange(length) >= length // 2, ids, IGNORE)
    return View(ids, torch.ones_like(ids), labels)


def states_and_logits(model: nn.Module, view: View | None = None) -> tuple[Tensor, Tensor]:
    """Last hidden states [n, H], and what the model's own forward says of the same positions [n, V]."""
    view = some_view(vocabulary=base_model_of(model).config.vocab_size) if view is None else view
    hidden = decode(model, view.input_ids, view.attention_mask).last_hidden_state
    logits = model(input_ids=view.input_ids, attention_mask=view.attention_mask).logits
    return hidden.flatten(0, 1), logits.flatten(0, 1)


@every_architecture
def test_rebuilt_logits_are_the_models_own(model_type, scale, soft_cap, bias):
    """Prevents a loss on logits that the model never gives, because a factor, a bound or a bias lives outside the
    weight.
    """
    model = tiny(model_type)
    head = Head.of(model)
    assert (head.scale, head.soft_cap, head.bias is not None) == (scale, soft_cap, bias)
    assert head.vocab_size == VOCABULARY
    with torch.no_grad():
        hidden, logits = states_and_logits(model)
        assert logits.abs().max() > 0.3
        torch.testing.assert_close(head.logits(hidden), logits, rtol=1e-5, atol=1e-5)
        head.check(hidden, logits)


@pytest.mark.parametrize("model_type", [kind for kind, *rule in KNOWN if rule != [1.0, None, False]])
def test_the_rule_of_each_architecture_matters(model_type):
    """Prevents the test above from passing on models whose rule is too weak to be seen, and a check that lets a
    forgotten rule through.
    """
    model = tiny(model_type)
    with torch.no_grad():
        hidden, logits = states_and_logits(model)
        plain = Head(model.get_output_embeddings().weight)
        assert (plain.logits(hidden) - logits).abs().max() > 0.02
        with pytest.raises(HeadError, match="differ from the model's own"):
            plain.check(hidden, logits)


@every_architecture
def test_objective_through_the_head_equals_dense_autograd(model_type, scale, soft_cap, bias):
    """Prevents value or gradient from missing the derivative of a factor, a bound or a bias, in any parameter of the
    model: the reference is the model's own forward with its whole [B, T, V] logits.
    """
    model, teacher, view = tiny(model_type), tiny(model_type, seed=1), some_view()
    mask = view.labels[:, 1:] != IGNORE
    with torch.no_grad():
        theirs = teacher(input_ids=view.input_ids, attention_mask=view.attention_mask).logits[:, :-1][mask]
        their_states = decode(teacher, view.input_ids, view.attention_mask).last_hidden_state
    logits = model(input_ids=view.input_ids, attention_mask=view.attention_mask).logits[:, :-1][mask]
    expected = nn.functional.cross_entropy(logits, view.targets, reduction="sum") + 0.5 * nn.functional.kl_div(
        logits.log_softmax(-1), theirs.log_softmax(-1), reduction="sum", log_target=True
    )
    names, parameters = zip(*model.named_parameters(), strict=True)
    wanted = torch.autograd.grad(expected, parameters, allow_unused=True)

    hidden = decode(model, view.input_ids, view.attention_mask).last_hidden_state
    result = build_objective(["cross_entropy", {"kind": "forward_kl", "weight": 0.5}], 3)(
        DenseRows(supervised(hidden, view.labels), Head.of(model)),
        TeacherSignal(DenseRows(supervised(their_states, view.labels), Head.of(teacher))),
        view.targets,
    )
    found = torch.autograd.grad(result.total, parameters, allow_unused=True)
    assert result.total.item() == pytest.approx(expected.item(), rel=1e-5)
    largest = max(gradient.abs().max().item() for gradient in wanted if gradient is not None)
    head_name = next(name for name, one in zip(names, parameters, strict=True) if one is Head.of(model).weight)
    assert wanted[names.index(head_name)].abs().max() > 1e-2
    for name, ours, theirs_ in zip(names, found, wanted, strict=True):
        assert (ours is None) == (theirs_ is None), name
        if theirs_ is not None:
            torch.testing.assert_close(
                ours, theirs_, rtol=1e-4, atol=2e-6 * max(1.0, largest), msg=lambda m, n=name: n + m
            )


# ------------------------------------------------------------------------------- what is not known


def refused(model: nn.Module) -> None:
    """The check must see that the head isn't the whole truth."""
    with torch.no_grad():
        hidden, logits = states_and_logits(model)
        with pytest.raises(HeadError, match="differ from the model's own.*something else"):
            Head.of(model).check(hidden, logits)


def test_an_unknown_change_of_the_logits_is_refused(model, monkeypatch):
    """Prevents a silently different objective for an architecture that does something new to its logits."""
    forward = model.forward

    def changed(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 1.001
        return output

    Head.of(model).check(*states_and_logits(model))
    monkeypatch.setattr(model, "forward", changed)
    refused(model)


def test_a_bound_by_another_name_is_refused():
    """Prevents RecurrentGemma, whose soft cap has a name of its own, from being trained without it."""
    refused(tiny("recurrent_gemma"))


def test_a_hook_on_the_head_is_refused(model):
    """Prevents a forward hook on the head (steering, a logit bias) from being bypassed."""
    model.lm_head.register_forward_hook(lambda module, inputs, output: output.roll(1, dims=-1))
    refused(model)


def test_logits_of_another_width_are_refused_as_such(model):
    """Prevents a tensor-size message without advice, where a model cuts the padding off its logits."""
    with torch.no_grad():
        hidden, logits = states_and_logits(model)
        with pytest.raises(HeadError):
            Head.of(model).check(hidden, logits[:, :-4])


@pytest.mark.parametrize("broken", [False, True])
def test_the_head_is_read_whatever_the_logits_are(model, monkeypatch, broken):
    """Prevents a process whose logits are no numbers from leaving the others alone in the gathering of a head."""
    if broken:
        nn.init.constant_(model.model.norm.weight, float("nan"))
    read = []
    monkeypatch.setattr("hfkd.student.Head.of", lambda one: read.append(one) or Head(one.lm_head.weight))
    with torch.no_grad():
        check_head(model.eval(), some_view())
    assert read == [model]


def test_logits_that_are_not_numbers_do_not_pass(model):
    """Prevents a check that anything passes once one logit is NaN."""
    with torch.no_grad():
        hidden, logits = states_and_logits(model)
        logits[3, 5] = float("nan")
        with pytest.raises(HeadError):
            Head.of(model).check(hidden, logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "phi"])
def test_half_precision_passes_its_own_check(model_type, dtype):
    """Prevents a tolerance that refuses a sound model for the rounding of its dtype."""
    model = tiny(model_type).to(dtype)
    with torch.no_grad():
        hidden, logits = states_and_logits(model)
        Head.of(model).check(hidden, logits)


def test_half_precision_is_no_excuse():
    """Prevents a tolerance that lets a forgotten soft cap through in bfloat16."""
    model = tiny("gemma2").bfloat16()
    with torch.no_grad():
        hidden, logits = states_and_logits(model)
        with pytest.raises(HeadError):
            Head(model.get_output_embeddings().weight).check(hidden, logits)


class Scaled(nn.Linear):
    """A linear layer whose product is not the one with its weight."""

    def forward(self, states: Tensor) -> Tensor:
        return 2.0 * super().forward(states)


@pytest.mark.parametrize(
    "layer",
    [Scaled(32, 384, bias=False), nn.Sequential(nn.Linear(32, 384, bias=False)), nn.Bilinear(32, 1, 384)],
    ids=lambda layer: type(layer).__name__,
)
def test_a_head_that_is_no_plain_linear_layer_is_refused(model, layer):
    """Prevents a weight from being read that the model doesn't multiply with, as in a quantised layer."""
    model.set_output_embeddings(layer)
    with pytest.raises(HeadError, match=f"{type(layer).__name__}.*plain torch.nn.Linear"):
        Head.of(model)


def test_a_parametrised_head_is_refused(model):
    """Prevents weight normalisation on the head from costing a recomputation for each chunk, or being bypassed."""
    nn.utils.parametrizations.weight_norm(model.lm_head)
    with pytest.raises(HeadError, match="plain torch.nn.Linear"):
        Head.of(model)


def test_a_quantised_weight_is_refused(model):
    """Prevents codes from being taken for weights where a quantised layer is still an `nn.Linear`."""
    codes = torch.ones(384, 32, dtype=torch.int8)
    model.lm_head = nn.Linear(32, 384, bias=False)
    model.lm_head.weight = nn.Parameter(codes, requires_grad=False)
    with pytest.raises(HeadError, match="quantised.*int8.*lm_head"):
        Head.of(model)


def test_a_model_without_a_head_is_refused(model):
    """Prevents an `AttributeError` on None for somebody who loaded the backbone with `AutoModel`."""
    with pytest.raises(HeadError, match="LlamaModel"):
        Head.of(model.model)
    ids = torch.tensor([[3, 4]])
    with pytest.raises(HeadError, match="AutoModelForCausalLM"):
        decode(model.model, ids, torch.ones_like(ids))


# ------------------------------------------------------------------------------------- adapters


def adapted(**settings) -> nn.Module:
    """A PEFT model around an untied Llama, its adapter far from zero."""
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **settings})
    torch.manual_seed(3)
    peft_model = get_peft_model(make_model(seed=0, tie_word_embeddings=False), config).eval()
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape))
                assert "lora" in name or "modules_to_save" in name or "token_adapter" in name
    return peft_model


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"target_modules": "all-linear"}])
def test_an_adapter_below_the_head_is_in_force(settings):
    """Prevents a backbone that is run around its adapter: LoRA lies within the layers, so it must show."""
    peft_model = adapted(**settings)
    with torch.no_grad():
        hidden, logits = states_and_logits(peft_model)
        Head.of(peft_model).check(hidden, logits)
        with peft_model.disable_adapter():
            without, plain = states_and_logits(peft_model)
            Head.of(peft_model).check(without, plain)
    assert (hidden - without).abs().max() > 1e-2
    assert Head.of(peft_model).weight is peft_model.get_base_model().lm_head.weight


def test_an_adapter_on_the_head_is_refused():
    """Prevents LoRA on `lm_head` from being trained by nobody: its weight alone is not the product."""
    peft_model = adapted(target_modules=["q_proj", "lm_head"])
    with pytest.raises(HeadError, match="(?s)adapter on the head.*target_modules.*modules_to_save"):
        Head.of(peft_model)


def test_single_trained_tokens_on_a_tied_head_are_refused():
    """Prevents a tied head from being read without the rows that `trainable_token_indices` put on top of it."""
    config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 6], task_type="CAUSAL_LM")
    peft_model = get_peft_model(make_model(seed=0), config)
    with pytest.raises(HeadError, match="plain torch.nn.Linear"):
        Head.of(peft_model)


def test_a_trained_copy_of_the_head_is_in_force_and_gets_the_gradient():
    """Prevents `modules_to_save: [lm_head]`, which we advise, from reading or training the frozen original."""
    peft_model = adapted(modules_to_save=["lm_head"])
    wrapper = peft_model.get_base_model().lm_head
    copy, original = wrapper.modules_to_save["default"].weight, wrapper.original_module.weight
    assert (copy - original).abs().max() > 0.1
    assert Head.of(peft_model).weight is copy
    hidden, logits = states_and_logits(peft_model)
    Head.of(peft_model).check(hidden, logits)
    build_objective("cross_entropy")(
        DenseRows(hidden, Head.of(peft_model)), None, torch.zeros(len(hidden), dtype=torch.long)
    ).total.backward()
    assert copy.grad.abs().max() > 1e-3 and original.grad is None


def test_the_original_head_teaches_while_the_adapter_is_off():
    """Prevents a self-teacher with the adapter off from speaking through the student's trained head."""
    peft_model = adapted(modules_to_save=["lm_head"])
    wrapper = peft_model.get_base_model().lm_head
    with torch.no_grad(), peft_model.disable_adapter():
        assert Head.of(peft_model).weight is wrapper.original_module.weight
        hidden, logits = states_and_logits(peft_model)
        Head.of(peft_model).check(hidden, logits)
        torch.testing.assert_close(logits, states_and_logits(make_model(seed=0, tie_word_embeddings=False))[1])
    assert Head.of(peft_model).weight is wrapper.modules_to_save["default"].weight


def test_the_copy_of_the_active_adapter_is_in_force():
    """Prevents the first adapter's head from being read while the second one is active."""
    peft_model = adapted(modules_to_save=["lm_head"])
    peft_model.add_adapter(
        "second", LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    )
    copies = peft_model.get_base_model().lm_head.modules_to_save
    for name in ("second", "default"):
        peft_model.set_adapter(name)
        assert Head.of(peft_model).weight is copies[name].weight
        with torch.no_grad():
            Head.of(peft_model).check(*states_and_logits(peft_model))


def test_virtual_tokens_are_refused():
    """Prevents prompt tuning, whose virtual tokens a call below PEFT's wrapper would skip."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    peft_model = get_peft_model(make_model(seed=0), config)
    for reading in (Head.of, base_model_of):
        with pytest.raises(HeadError, match="PROMPT_TUNING.*virtual tokens.*LoRA"):
            reading(peft_model)


# -------------------------------------------------------------------------------- what a head can do


def test_a_head_cut_short_keeps_its_rules():
    """Prevents padded vocabularies from losing bias, scale or soft cap when the tail is cut off."""
    generator = torch.Generator().manual_seed(0)
    weight, bias, hidden = (torch.randn(*shape, generator=generator) for shape in ((10, 4), (10,), (3, 4)))
    head = Head(weight, bias, scale=2.0, soft_cap=3.0)
    torch.testing.assert_close(head.first(7).logits(hidden), head.logits(hidden)[:, :7])
    assert head.first(7).vocab_size == 7 and head.first(10) is head and head.first(12) is head


def test_bias_comes_before_scale_and_scale_before_the_cap():
    """Prevents the order of the rules from changing, which no architecture with one rule alone would show."""
    head = Head(torch.tensor([[1.0], [2.0]]), torch.tensor([0.5, -0.5]), scale=2.0, soft_cap=3.0)
    expected = 3.0 * torch.tanh(torch.tensor([[2.0 * (3.0 + 0.5), 2.0 * (6.0 - 0.5)]]) / 3.0)
    torch.testing.assert_close(head.logits(torch.tensor([[3.0]])), expected)


def test_a_ruled_out_id_keeps_its_bias_finite():
    """Prevents NaN from a bias of minus infinity, which rules out an id: 0 * inf."""
    head = Head(torch.ones(3, 2), torch.tensor([0.0, float("-inf"), 1.0]))
    logits = head.logits(torch.ones(1, 2))
    assert torch.isfinite(logits).all()
    assert logits.softmax(-1)[0, 1] == 0.0


def test_a_detached_head_shares_its_weights():
    """Prevents a copy of the vocabulary's matrix at every step, and a teacher with a graph."""
    weight, bias = torch.randn(5, 2, requires_grad=True), torch.randn(5, requires_grad=True)
    detached = Head(weight, bias, 2.0, 3.0).detached()
    assert not detached.weight.requires_grad and not detached.bias.requires_grad
    assert detached.weight.data_ptr() == weight.data_ptr() and (detached.scale, detached.soft_cap) == (2.0, 3.0)
