"""`EarlyExitTeacher`: which layer speaks, through which norm, and where it keeps its opinion to itself."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model, make_tokenizer
from training import DEMONSTRATIONS, ROWS, lora, make_trainer, run, worst_difference
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, GPTNeoXConfig, OPTConfig

from hfkd import DistillationCollator, DistillationDataset, PromptBuilder, PromptStyle
from hfkd.batch import Batch
from hfkd.errors import StateError
from hfkd.recipe import RecipeError, load_recipe
from hfkd.rows import Head, decode
from hfkd.run.models import make_teacher
from hfkd.sharding import Launch
from hfkd.signal import DISTRIBUTION, STATES
from hfkd.states import recording
from hfkd.teachers import EarlyExitTeacher
from hfkd.teachers.early_exit import final_norm

LAYERS = 4


@pytest.fixture(scope="module")
def deep():
    return make_model(seed=0, num_hidden_layers=LAYERS)


def dataset(count: int = 40) -> DistillationDataset:
    rows = [{"prompt": f"{row['prompt']} {place}", "completion": row["completion"]} for place, row in enumerate(ROWS)]
    rows = (rows * 3)[:count]
    return DistillationDataset(rows, PromptBuilder(make_tokenizer(), PromptStyle()))


def batch_of(texts: DistillationDataset, count: int = 6) -> Batch:
    return Batch.from_inputs(DistillationCollator(2)([texts[number] for number in range(count)]))


def ready(model, **settings) -> EarlyExitTeacher:
    teacher = EarlyExitTeacher(**{"weights": "live", "reuse_prefix": False, **settings})
    teacher.prepare(Launch(torch.device("cpu")), model)
    return teacher


def logits_of(teacher: EarlyExitTeacher, batch: Batch) -> torch.Tensor:
    rows = teacher.signal(batch, frozenset({DISTRIBUTION})).rows
    return rows.head.logits(rows.hidden)


def by_hand(model, batch: Batch, layer: int) -> torch.Tensor:
    """The logit lens through transformers' own `hidden_states`, norm and head."""
    view = batch.student
    with torch.no_grad():
        states = model(input_ids=view.input_ids, attention_mask=view.attention_mask, output_hidden_states=True)
        below = states.hidden_states[layer]
        logits = states.logits if layer == LAYERS else model.lm_head(model.model.norm(below))
    return logits[:, :-1][view.labels[:, 1:] != -100]


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_it_says_what_the_model_would_say_if_it_ended_there(deep, layer):
    """Prevents a layer that is off by one, a state that goes past the norm, or one that goes through it twice."""
    batch = batch_of(dataset())
    torch.testing.assert_close(logits_of(ready(deep, layer=layer), batch), by_hand(deep, batch, layer))


def test_without_a_layer_it_is_the_middle(deep):
    """Prevents a default that is the last layer, from which nothing can be learned."""
    assert ready(deep).layer == LAYERS // 2


def test_where_the_layers_agree_the_last_one_speaks(deep):
    """Prevents a weak layer that pulls at tokens on which both layers are of one mind, and one that says nothing where
    they are not.
    """
    batch = batch_of(dataset(), 24)
    exit_logits, last = by_hand(deep, batch, 2), by_hand(deep, batch, LAYERS)
    same = exit_logits.argmax(-1) == last.argmax(-1)
    assert 0 < int(same.sum()) < len(same), "the case needs both kinds of tokens"
    expected = torch.where(same[:, None], last, exit_logits)
    found = logits_of(ready(deep, layer=2, only_where_layers_disagree=True), batch)
    torch.testing.assert_close(found, expected)


def test_states_of_other_layers_can_be_asked_for_beside(deep):
    """Prevents losses on states from reading the exit's layer in place of theirs."""
    teacher, batch = ready(deep, layer=2), batch_of(dataset())
    teacher.keep_states([1, LAYERS])
    states = teacher.signal(batch, frozenset({DISTRIBUTION, STATES})).states
    assert sorted(states) == [1, LAYERS]
    view = batch.student
    with torch.no_grad(), recording(deep, [1]) as recorder:
        hidden = deep.model(input_ids=view.input_ids, attention_mask=view.attention_mask).last_hidden_state
    kept = view.labels[:, 1:] != -100
    torch.testing.assert_close(states[1], recorder.finish(hidden)[1][:, :-1][kept])


def test_a_trained_norm_comes_nearer_to_the_last_layer(deep, caplog):
    """Prevents a fit that doesn't fit, and one that changes the model whose norm it is a copy of."""
    before = {name: value.clone() for name, value in deep.state_dict().items()}
    flags = [parameter.requires_grad for parameter in deep.parameters()]
    texts = dataset()
    teacher = ready(deep, layer=2, norm="trained", fit_steps=60)
    with caplog.at_level("INFO", logger="hfkd.teachers.early_exit"):
        teacher.meet(texts)
    batch = batch_of(texts, 24)
    last = torch.log_softmax(by_hand(deep, batch, LAYERS), -1)

    def apart(logits: torch.Tensor) -> float:
        return (last.exp() * (last - torch.log_softmax(logits, -1))).sum(-1).mean().item()

    assert apart(logits_of(teacher, batch)) < 0.9 * apart(by_hand(deep, batch, 2))
    assert "nats per token" in caplog.text
    assert all(torch.equal(value, before[name]) for name, value in deep.state_dict().items())
    assert flags == [parameter.requires_grad for parameter in deep.parameters()]


def test_a_fit_that_makes_it_worse_is_undone(deep, monkeypatch, caplog):
    """Prevents a teacher that is worse than the plain lens because its fit ran away."""
    monkeypatch.setattr("hfkd.teachers.early_exit._LEARNING_RATE", 1e4)
    teacher, texts = ready(deep, layer=2, norm="trained", fit_steps=3), dataset()
    teacher.meet(texts)
    assert "made it worse" in caplog.text
    batch = batch_of(texts)
    torch.testing.assert_close(logits_of(teacher, batch), by_hand(deep, batch, 2))


def test_a_trained_norm_without_texts_is_refused(deep, tmp_path):
    """Prevents a norm that is called trained and is the last layer's."""
    teacher = ready(deep, norm="trained")
    teacher.meet(dataset(), training=False)  # held-out texts are not to be fitted
    with pytest.raises(RuntimeError, match="has met no texts"):
        teacher.check_heads(lambda one: None)
    collator = DistillationCollator(2)
    texts = [dataset()[number] for number in range(16)]
    teacher = EarlyExitTeacher(1, "trained", weights="live")
    trainer = make_trainer(tmp_path, teacher=teacher, peft_config=lora(), rows=texts, data_collator=collator)
    with pytest.raises(RuntimeError, match="With a collator of your own take norm='final'"):
        trainer.train()


def test_a_model_in_half_precision_is_fitted_in_float32():
    """Prevents a fit whose steps are lost in the rounding, or an exit in another type than its head."""
    model = make_model(seed=0, num_hidden_layers=LAYERS).to(torch.bfloat16)
    teacher = ready(model, layer=2, norm="trained", fit_steps=3)
    teacher.meet(dataset())
    assert teacher.state_dict()["norm.weight"].dtype == torch.float32
    assert teacher.signal(batch_of(dataset()), frozenset({DISTRIBUTION})).rows.hidden.dtype == torch.bfloat16


def test_fitting_twice_gives_the_same(deep):
    """Prevents processes, or a resumed run, whose teachers differ."""
    found = []
    for _ in range(2):
        teacher = ready(deep, layer=2, norm="trained", fit_steps=5)
        teacher.meet(dataset())
        found.append(teacher.state_dict()["norm.weight"])
    assert torch.equal(*found) and not torch.equal(found[0], final_norm(deep).weight)


def test_a_resumed_run_keeps_the_norm(tmp_path):
    """Prevents a norm that is fitted anew, to a student that has moved, in the middle of a run."""

    def made(folder, **settings):
        teacher = EarlyExitTeacher(1, "trained", 4, weights="live")
        return make_trainer(folder, teacher=teacher, peft_config=lora(), max_steps=3, **settings)

    straight = made(tmp_path / "straight")
    straight.train()
    stopped = {"save_strategy": "steps", "save_steps": 1}
    made(tmp_path / "stopped", **stopped).train()
    resumed = made(tmp_path / "stopped", **stopped)
    resumed.teacher._trained.weight.data.mul_(3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-2"))
    first, second = (dict(trainer.model.named_parameters()) for trainer in (straight, resumed))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_of_another_norm_is_refused(deep):
    """Prevents a trained norm that is dropped in silence."""
    trained = ready(deep, norm="trained", fit_steps=1)
    trained.meet(dataset())
    with pytest.raises(ValueError, match="Resume with the model and the `norm`"):
        ready(deep).load_state_dict(trained.state_dict())


def test_a_fit_draws_nothing_that_a_run_draws(deep):
    """Prevents a training whose dropout depends on whether its teacher was fitted."""
    before, modes = torch.get_rng_state(), [module.training for module in deep.modules()]
    teacher = ready(deep, layer=2, norm="trained", fit_steps=3)
    teacher.meet(dataset())
    assert torch.equal(before, torch.get_rng_state())
    assert modes == [module.training for module in deep.modules()]


@pytest.mark.parametrize("weights", ["live", "adapter_off", "frozen_copy"])
def test_a_run_learns_from_it_without_a_second_prompt(tmp_path, weights):
    """Prevents an early exit that is refused on the student's own prompt like a self-teacher, or teaches nothing; the
    three weights must teach three things once the student moves.
    """
    teacher = EarlyExitTeacher(1, weights=weights)
    settings = {"peft_config": lora(), "demonstrations": [], "objective": "forward_kl"}
    update, losses = run(tmp_path, teacher=teacher, **settings)
    assert losses[0] > 0.01 and max(float(value.abs().max()) for value in update.values()) > 0


def test_live_and_frozen_part_as_the_student_moves(tmp_path):
    """Prevents `live` from being the layers of the first step."""
    found = {}
    for weights in ("live", "frozen_copy"):
        settings = {"peft_config": lora(), "demonstrations": []}
        found[weights] = run(tmp_path / weights, teacher=EarlyExitTeacher(1, weights=weights), **settings)
    assert found["live"][1][0] == pytest.approx(found["frozen_copy"][1][0], rel=1e-5)
    assert found["live"][1][1] != pytest.approx(found["frozen_copy"][1][1], rel=1e-4)


def test_a_teacher_that_agrees_everywhere_moves_nothing(tmp_path, monkeypatch):
    """Prevents a pull of the last layer on itself: where both layers agree the divergence is 0, like its slope."""
    monkeypatch.setattr(EarlyExitTeacher, "_or_last", lambda self, head, left, hidden, labels: hidden)
    teacher = EarlyExitTeacher(1, weights="live", only_where_layers_disagree=True, reuse_prefix=False)
    trainer = make_trainer(tmp_path, teacher=teacher, peft_config=lora(), demonstrations=[])
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx([0.0, 0.0], abs=1e-6)
    for name, value in trainer.model.named_parameters():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-5)


def test_the_shared_prefix_changes_nothing(tmp_path):
    """Prevents an exit that reads the rest of a prompt as if nothing stood before it."""
    many = [{"prompt": f"word{place} and more", "completion": f"words{place} and more"} for place in range(6)]
    found = []
    for reuse in (True, False):
        teacher = EarlyExitTeacher(1, weights="live", reuse_prefix=reuse)
        settings = {"peft_config": lora(), "demonstrations": many, "teacher": teacher}
        found.append(run(tmp_path / str(reuse), **settings)[0])
    assert worst_difference(*found) < 1e-4


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (GPT2Config(n_layer=3, n_head=2, n_embd=16, vocab_size=50), "ln_f"),
        (GPTNeoXConfig(num_hidden_layers=3, hidden_size=16, num_attention_heads=2, vocab_size=50), "final_layer_norm"),
        (BloomConfig(n_layer=3, hidden_size=16, n_head=2, vocab_size=50), "ln_f"),
        (
            OPTConfig(num_hidden_layers=3, hidden_size=16, num_attention_heads=2, ffn_dim=16, vocab_size=50),
            "final_layer_norm",
        ),
    ],
    ids=["gpt2", "neox", "bloom", "opt"],
)
def test_the_last_norm_is_found_and_held_against_the_model(config, name):
    """Prevents the norm behind the embeddings, or one inside a block, from being taken for the last."""
    model = AutoModelForCausalLM.from_config(config).eval()
    assert final_norm(model) is next(module for key, module in model.named_modules() if key.endswith(name))
    teacher = ready(model, layer=1)
    teacher.check_heads(lambda one: decode(one, torch.tensor([[3, 4, 5, 6]]), None))


def test_a_model_that_does_more_behind_its_blocks_is_refused(deep):
    """Prevents a lens that leaves out a step of the model without a word."""
    teacher = ready(deep)
    norm = final_norm(deep)
    handle = norm.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 1.5,))
    try:
        with pytest.raises(StateError, match="does more between its last block"):
            teacher.check_heads(lambda one: decode(one, torch.tensor([[3, 4, 5]]), None))
    finally:
        handle.remove()


def test_a_model_without_a_norm_to_find_is_refused():
    """Prevents a lens through the wrong norm where there are several behind the blocks."""
    model = make_model()
    model.model.second_norm = torch.nn.LayerNorm(32)
    with pytest.raises(StateError, match="has 2 norms"):
        ready(model, layer=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": 0}, "layer is 0"),
        ({"layer": 1.5}, "layer is 1.5"),
        ({"norm": "none"}, "norm is 'none'"),
        ({"fit_steps": 0}, "fit_steps is 0"),
        ({"weights": "shadow"}, "weights are 'shadow'"),
    ],
)
def test_bad_settings_are_refused_at_once(settings, message):
    """Prevents a typing mistake that is found when the model is loaded."""
    with pytest.raises(ValueError, match=message):
        EarlyExitTeacher(**settings)


def test_the_last_layer_is_refused(deep):
    """Prevents a teacher that is the student itself."""
    with pytest.raises(ValueError, match="expected 1 to 3"):
        ready(deep, layer=LAYERS)


def test_shards_are_refused(deep):
    """Prevents a norm that is read while its weights are elsewhere."""
    launch = Launch(torch.device("cpu"), is_zero3=True)
    with pytest.raises(ValueError, match="spread over the processes"):
        EarlyExitTeacher(weights="live").prepare(launch, deep)


def test_it_does_not_write(deep):
    """Prevents answers of the whole model that pass for those of the exit."""
    assert not EarlyExitTeacher().writes


RECIPE = """
student: {model: somewhere, lora: {r: 4}}
teacher: {kind: early_exit, weights: live, layer: 12, norm: trained, fit_steps: 7, only_where_layers_disagree: true}
data: {train: {path: rows.jsonl}}
loss: {terms: [{kind: cross_entropy}, {kind: forward_kl, weight: 0.2}]}
training: {output_dir: out}
"""


def recipe(tmp_path, text: str = RECIPE):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path)


def test_a_recipe_makes_it(tmp_path):
    """Prevents keys of a recipe that are read and dropped."""
    told = make_teacher(recipe(tmp_path)).describe()
    assert told == {
        **{"kind": "early_exit", "weights": "live", "layer": 12, "norm": "trained", "fit_steps": 7},
        **{"only_where_layers_disagree": True, "reuse_prefix": True},
    }


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("layer: 12", "decay: 0.9", "teacher.decay: got 0.9, which a teacher of kind early_exit doesn't use"),
        ("weights: live", "weights: adapter_off", "weights: adapter_off needs an adapter"),
        ("rows.jsonl}", "rows.jsonl}, answer: teacher", "a teacher of kind early_exit can't"),
        ("rows.jsonl}", "rows.jsonl}, answer: student", "trained is fitted to the training texts"),
        ("norm: trained", "norm: new", "teacher.norm"),
        ("early_exit, weights: live", "self", "teacher.layer: got 12, which a teacher of kind self doesn't use"),
    ],
)
def test_recipes_that_can_not_work_are_refused(tmp_path, old, new, message):
    """Prevents an hour of training before such a fault is seen."""
    text = RECIPE.replace(old, new)
    text = text.replace(", lora: {r: 4}", "") if "adapter_off" in new else text
    with pytest.raises(RecipeError, match=message):
        recipe(tmp_path, text)


def test_the_head_it_speaks_with_is_the_models(deep):
    """Prevents an exit with a copy of the head, which would be another one after a step."""
    rows = ready(deep).signal(batch_of(dataset()), frozenset({DISTRIBUTION})).rows
    assert rows.head.weight.data_ptr() == Head.of(deep).weight.data_ptr()


def test_demonstrations_are_read_by_the_exit_alone(tmp_path):
    """Prevents an exit that reads the student's prompt where it has one of its own."""
    found = []
    for shown in ([], DEMONSTRATIONS):
        settings = {"peft_config": lora(), "demonstrations": shown, "teacher": EarlyExitTeacher(1, weights="live")}
        found.append(run(tmp_path / str(len(shown)), **settings)[1][0])
    assert found[0] != pytest.approx(found[1], rel=1e-3)
