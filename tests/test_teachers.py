"""Teachers: which weights speak, that nothing of the student is left changed, and what is refused."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from accelerate import Accelerator
from architectures import tiny
from conftest import make_model, make_tokenizer
from peft import LoraConfig, get_peft_model
from test_prefix import view_of
from torch import Tensor, nn

from hfkd.batch import Batch
from hfkd.errors import VocabularyError
from hfkd.prefix import SharedPrefix
from hfkd.rows import DenseRows, Head
from hfkd.signal import DISTRIBUTION, TeacherSignal
from hfkd.teachers import LocalTeacher, SelfTeacher, Teacher, as_teacher, check_same_tokens, evaluating

NEEDS = frozenset({DISTRIBUTION})
LONG = [3 + (7 * place) % 90 for place in range(40)]
"""A prefix that is long enough to be shared."""


@pytest.fixture
def accelerator() -> Accelerator:
    """On the CPU."""
    return Accelerator(cpu=True)


def batch_of(side: str = "right") -> Batch:
    """The student reads three questions; the teacher reads them behind demonstrations."""
    return Batch(view_of(side, prefix=[4]), view_of(side, prefix=LONG))


def student(*, dropout: float = 0.0, train: bool = True, seed: int = 0, **settings) -> nn.Module:
    """A PEFT model whose adapter is not zero, as after some steps."""
    torch.manual_seed(11)
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    config |= {"init_lora_weights": False, "lora_dropout": dropout, **settings}
    return get_peft_model(make_model(seed=seed), LoraConfig(**config)).train(train)


def logits_of(signal: TeacherSignal) -> Tensor:
    """[N, V] what a signal says."""
    with torch.no_grad():
        return signal.rows.head.logits(signal.rows.hidden)


def spoken(teacher: Teacher, batch: Batch | None = None) -> Tensor:
    """[N, V] what a teacher says of a batch."""
    return logits_of(teacher.signal(batch_of() if batch is None else batch, NEEDS))


def plain(model: nn.Module, batch: Batch | None = None) -> Tensor:
    """[N, V] what a model's own forward says of the teacher's view."""
    view = (batch_of() if batch is None else batch).teacher_view
    was_training = model.training
    with torch.no_grad():
        logits = model.eval()(
            input_ids=view.input_ids, attention_mask=view.attention_mask, position_ids=view.position_ids
        ).logits
    model.train(was_training)
    return logits[:, :-1][view.labels[:, 1:] != -100]


def close(ours: Tensor, theirs: Tensor) -> None:
    """Equal but for rounding, and not because both are nothing."""
    assert theirs.abs().max() > 0.5
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def change(model: nn.Module, factor: float = 1.2) -> None:
    """Stands for an optimizer step."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(factor)


def every_teacher(accelerator: Accelerator) -> dict[str, Teacher]:
    """One prepared teacher of each kind."""
    made: dict[str, Teacher] = {"local": LocalTeacher(make_model(seed=1))}
    made |= {kind: SelfTeacher(kind) for kind in ("adapter_off", "live", "frozen_copy")}
    for teacher in made.values():
        teacher.prepare(accelerator, student(dropout=0.5))
    return made


# --------------------------------------------------------------------------- the adapter switched off


@pytest.mark.parametrize("share", [False, True], ids=["whole", "prefix"])
def test_adapter_off_is_the_untouched_base(accelerator, share):
    """Prevents a student from being taught by itself: the base must speak although the adapter says otherwise."""
    learner, teacher = student(), SelfTeacher("adapter_off")
    teacher.prepare(accelerator, learner)
    if share:
        teacher.share_prefix(LONG)
    assert all(p.abs().max() > 1e-2 for name, p in learner.named_parameters() if "lora_B" in name)
    close(spoken(teacher), plain(make_model(seed=0)))
    assert (plain(learner) - plain(make_model(seed=0))).abs().max() > 0.1
    assert (teacher.prefix is not None and teacher.prefix._cache is not None) == share


def test_the_adapter_is_on_again_with_everything_as_before(accelerator):
    """Prevents a step after which the adapter is off, or its weights no longer learn."""
    learner, teacher = student(modules_to_save=["norm"]), SelfTeacher("adapter_off")
    teacher.prepare(accelerator, learner)
    learning = {name: parameter.requires_grad for name, parameter in learner.named_parameters()}
    before = plain(learner)
    assert any(learning.values()) and not all(learning.values())
    for _ in range(2):
        spoken(teacher)
        assert {name: parameter.requires_grad for name, parameter in learner.named_parameters()} == learning
        assert torch.equal(plain(learner), before)


def test_the_adapter_is_on_again_after_an_error(accelerator):
    """Prevents a failed batch that is caught (out of memory, say) from leaving the adapter off for the rest of the
    run.
    """
    learner, teacher = student(), SelfTeacher("adapter_off")
    teacher.prepare(accelerator, learner)
    before = plain(learner)
    with pytest.raises(RuntimeError, match="stop"), teacher.weights():
        assert (plain(learner) - before).abs().max() > 0.1
        raise RuntimeError("stop")
    assert torch.equal(plain(learner), before)
    assert learner.training and all(p.requires_grad for name, p in learner.named_parameters() if "lora_" in name)


def test_teaching_between_forward_and_backward_loses_no_gradient(accelerator):
    """Prevents switching the adapter off from cutting a graph that was made before it."""
    learner, teacher = student(), SelfTeacher("adapter_off")
    teacher.prepare(accelerator, learner)
    view = batch_of().student

    def gradients(teach: bool) -> dict[str, Tensor]:
        learner.zero_grad()
        cost = learner(input_ids=view.input_ids, attention_mask=view.attention_mask, labels=view.labels).loss
        if teach:
            spoken(teacher)
        cost.backward()
        return {name: p.grad.clone() for name, p in learner.named_parameters() if p.grad is not None}

    without, beside = gradients(False), gradients(True)
    assert without and all(gradient.abs().max() > 0 for gradient in without.values())
    assert without.keys() == beside.keys()
    assert all(torch.equal(without[name], beside[name]) for name in without)


def test_a_frozen_part_of_the_adapter_stays_frozen(accelerator):
    """Prevents a part of the adapter that the user froze (LoRA-FA's A, say) from being trained after the first
    batch.
    """
    learner, teacher = student(), SelfTeacher("adapter_off")
    teacher.prepare(accelerator, learner)
    for name, parameter in learner.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    spoken(teacher)
    thawed = [name for name, parameter in learner.named_parameters() if "lora_A" in name and parameter.requires_grad]
    assert not thawed


def test_adapter_off_without_an_adapter_is_refused(accelerator, model):
    """Prevents an AttributeError at the first step of a student that is trained in full."""
    with pytest.raises(ValueError, match="adapter_off.*LlamaForCausalLM.*peft_config.*frozen_copy"):
        SelfTeacher("adapter_off").prepare(accelerator, model)


# ------------------------------------------------------------------------ live, and a frozen copy


def test_live_speaks_with_the_adapter_and_without_dropout(accelerator):
    """Prevents targets with dropout's noise, the adapter's own dropout included."""
    learner, teacher = student(dropout=0.5), SelfTeacher("live")
    teacher.prepare(accelerator, learner)
    close(spoken(teacher), plain(learner))
    assert torch.equal(spoken(teacher), spoken(teacher))
    assert (plain(learner) - plain(make_model(seed=0))).abs().max() > 0.1
    view = batch_of().teacher
    with torch.no_grad():  # a guard: the dropout is there
        first, second = (learner(input_ids=view.input_ids).logits for _ in range(2))
    assert (first - second).abs().max() > 0.1


def test_live_hears_of_every_step(accelerator):
    """Prevents the prefix of an old step from being read with the weights of a new one."""
    learner, teacher = student(), SelfTeacher("live")
    teacher.prepare(accelerator, learner)
    teacher.share_prefix(LONG)
    before = spoken(teacher)
    close(before, plain(learner))
    change(learner)
    expected = plain(learner)
    assert (expected - before).abs().max() > 0.1
    assert (spoken(teacher) - expected).abs().max() > 1e-2  # a guard: without a word it reads the old keys
    teacher.after_step(1)
    close(spoken(teacher), expected)


def test_adapter_off_keeps_its_prefix_over_steps(accelerator):
    """Prevents the base's prefix, which never changes, from being run again at every step."""
    learner, teacher = student(), SelfTeacher("adapter_off")
    teacher.prepare(accelerator, learner)
    teacher.share_prefix(LONG)
    expected = spoken(teacher)
    kept = teacher.prefix._cache
    change(learner)
    teacher.after_step(1)
    assert kept is not None and teacher.prefix._cache is kept
    assert torch.equal(spoken(teacher), expected)


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "full"])
def test_a_frozen_copy_stays_where_the_student_began(accelerator, adapter):
    """Prevents a teacher that follows its student because they share tensors."""
    learner = student() if adapter else make_model(seed=0).train()
    teacher = SelfTeacher("frozen_copy")
    teacher.prepare(accelerator, learner)
    expected = plain(learner)
    close(spoken(teacher), expected)
    change(learner)
    assert (plain(learner) - expected).abs().max() > 0.1
    close(spoken(teacher), expected)
    with teacher.weights() as copied:
        assert not any(parameter.requires_grad for parameter in copied.parameters())
        ours = {parameter.data_ptr() for parameter in learner.parameters()}
        assert ours.isdisjoint(parameter.data_ptr() for parameter in copied.parameters())
    assert any(parameter.requires_grad for parameter in learner.parameters()) and learner.training


def test_a_copy_of_a_tied_model_is_tied():
    """Prevents a copy whose head has lost its embeddings, and takes the vocabulary's memory once more."""
    teacher = SelfTeacher("frozen_copy")
    teacher.prepare(Accelerator(cpu=True), make_model(seed=0))
    with teacher.weights() as copied:
        assert copied.lm_head.weight is copied.model.embed_tokens.weight


def test_unknown_weights_are_refused():
    """Prevents a misspelt kind from becoming another teacher."""
    with pytest.raises(ValueError, match="adapter_of.*adapter_off, live, frozen_copy"):
        SelfTeacher("adapter_of")


# -------------------------------------------------------------------------- what all of them keep


@pytest.mark.parametrize("kind", ["local", "adapter_off", "live", "frozen_copy"])
@pytest.mark.parametrize("share", [False, True], ids=["whole", "prefix"])
def test_signals_come_without_a_graph(accelerator, kind, share):
    """Prevents the teacher's activations from being kept for a backward that never comes."""
    teacher = every_teacher(accelerator)[kind]
    if share:
        teacher.share_prefix(LONG)
    rows = teacher.signal(batch_of(), NEEDS).rows
    assert isinstance(rows, DenseRows) and rows.hidden.shape == (6, 32)
    assert rows.hidden.grad_fn is None and not rows.hidden.requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("kind", ["local", "adapter_off", "live", "frozen_copy"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_reuse_changes_no_teachers_word(accelerator, kind, side):
    """Prevents a speed setting from changing what is learned."""
    teacher, batch = every_teacher(accelerator)[kind], batch_of(side)
    expected = spoken(teacher, batch)
    teacher.share_prefix(LONG)
    close(spoken(teacher, batch), expected)
    assert teacher.prefix._cache is not None


@pytest.mark.parametrize("kind", ["local", "adapter_off", "live", "frozen_copy"])
def test_rows_are_those_of_the_students_tokens(accelerator, kind):
    """Prevents row i of the teacher from speaking of another token than row i of the student."""
    batch = batch_of()
    assert torch.equal(batch.student.targets, batch.teacher.targets)
    assert len(every_teacher(accelerator)[kind].signal(batch, NEEDS).rows) == batch.student.tokens


@pytest.mark.parametrize("kind", ["adapter_off", "live"])
def test_every_module_is_back_in_its_mode(accelerator, kind):
    """Prevents a student that is trained in eval mode after the first batch, or frozen modules that wake up."""
    learner, teacher = student(dropout=0.1), SelfTeacher(kind)
    teacher.prepare(accelerator, learner)
    learner.get_base_model().model.layers[1].eval()
    modes = {name: module.training for name, module in learner.named_modules()}
    assert len(set(modes.values())) == 2
    with pytest.raises(RuntimeError, match="stop"), teacher.weights() as model:
        assert not any(module.training for module in model.modules())
        raise RuntimeError("stop")
    assert {name: module.training for name, module in learner.named_modules()} == modes
    spoken(teacher)
    assert {name: module.training for name, module in learner.named_modules()} == modes


def test_evaluating_a_model_in_eval_mode_leaves_it_there(model):
    """Prevents a frozen teacher from being put into training mode on the way out."""
    with evaluating(model):
        assert not model.training
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(("length", "wanted", "shared"), [(31, True, False), (32, True, True), (32, False, False)])
def test_short_or_unwanted_prefixes_are_run_whole(accelerator, length, wanted, shared):
    """Prevents `reuse_prefix: false` from being ignored, and bookkeeping that costs more than it saves."""
    teacher = SelfTeacher("live", reuse_prefix=wanted)
    teacher.share_prefix(LONG[:length])
    assert (teacher.prefix is not None) == shared


def test_a_batch_without_the_prefix_is_run_whole(accelerator):
    """Prevents an evaluation set with other demonstrations from being read behind those of the training set."""
    teacher = LocalTeacher(make_model(seed=1))
    teacher.prepare(accelerator, student())
    batch = Batch(view_of(prefix=[4]), view_of(prefix=[token + 1 for token in LONG]))
    expected = spoken(teacher, batch)
    teacher.share_prefix(LONG)
    close(spoken(teacher, batch), expected)
    close(spoken(teacher), plain(make_model(seed=1)))  # and the prefix still serves those that have it


@pytest.mark.parametrize("model_type", ["mamba", "falcon_h1"])
def test_a_recurrent_teacher_says_once_that_it_reuses_nothing(accelerator, caplog, model_type):
    """Prevents a crash, a wrong signal or a warning at each batch where the cache can't be shared between rows."""
    expected_teacher, teacher = (LocalTeacher(tiny(model_type)) for _ in range(2))
    for one in (expected_teacher, teacher):
        one.prepare(accelerator, student())
    teacher.share_prefix(LONG)
    with caplog.at_level(logging.WARNING, logger="hfkd"):
        for _ in range(3):
            assert torch.equal(spoken(teacher), spoken(expected_teacher))
    said = [record for record in caplog.records if "prefix" in record.getMessage()]
    assert len(said) == 1 and "40 tokens isn't reused" in said[0].getMessage()


@pytest.mark.parametrize(
    "teacher", [LocalTeacher("somewhere"), SelfTeacher("live")], ids=lambda one: one.describe()["kind"]
)
def test_a_teacher_that_was_not_prepared_says_so(teacher):
    """Prevents an AttributeError on None when a teacher is used outside the trainer."""
    with pytest.raises(RuntimeError, match="prepare"):
        teacher.signal(batch_of(), NEEDS)


def test_a_teacher_without_a_model_cannot_write_answers():
    """Prevents `answer: teacher` from failing without a word about what to do instead."""

    class Silent(Teacher):
        def signal(self, batch: Batch, needs: frozenset[str]) -> TeacherSignal:
            return TeacherSignal()

    with pytest.raises(TypeError, match="Silent.*answer: dataset"):
        Silent().weights()


def test_teachers_describe_themselves_as_plain_data(accelerator):
    """Prevents a run record or a card that can't be written, or that doesn't say who taught."""
    described = {kind: teacher.describe() for kind, teacher in every_teacher(accelerator).items()}
    assert json.loads(json.dumps(described)) == described
    assert {described[kind]["weights"] for kind in ("adapter_off", "live", "frozen_copy")} == {
        "adapter_off",
        "live",
        "frozen_copy",
    }
    assert described["local"]["kind"] == "local" and described["local"]["dtype"] == "float32"


# ------------------------------------------------------------------------------ a model from a folder


@pytest.fixture
def folder(tmp_path) -> str:
    """A saved teacher with its tokenizer."""
    make_model(seed=1).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


def test_a_saved_teacher_is_loaded_frozen_and_in_eval_mode(accelerator, folder):
    """Prevents a teacher with dropout, one that enters the optimizer, or one that is loaded before it is needed."""
    teacher = LocalTeacher(folder)
    assert teacher.model is None
    teacher.prepare(accelerator, student())
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert not any(module.training for module in teacher.model.modules())
    close(spoken(teacher), plain(make_model(seed=1)))
    assert teacher.tokenizer.get_vocab() == make_tokenizer().get_vocab()
    assert teacher.describe()["model"] == folder


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16], ids=["name", "dtype"])
def test_a_saved_teacher_takes_the_dtype_asked_for(accelerator, folder, dtype):
    """Prevents a teacher that takes twice the memory that was planned for."""
    teacher = LocalTeacher(folder, dtype=dtype)
    teacher.prepare(accelerator, student())
    assert {parameter.dtype for parameter in teacher.model.parameters()} == {torch.bfloat16}
    assert teacher.describe()["dtype"] == "bfloat16"
    torch.testing.assert_close(spoken(teacher).float(), plain(make_model(seed=1)), rtol=0.1, atol=0.25)


def test_a_teacher_is_loaded_as_it_was_saved(accelerator, tmp_path):
    """Prevents `auto` from widening a bfloat16 teacher to float32."""
    make_model(seed=1).bfloat16().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    teacher = LocalTeacher(str(tmp_path))
    teacher.prepare(accelerator, student())
    assert teacher.model.dtype == torch.bfloat16


def test_a_truncated_file_is_an_error_that_says_so(accelerator, folder, tmp_path):
    """Prevents half a download from becoming a teacher with random weights."""
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for kept in (len(whole) // 2, 4, 0):
        file.write_bytes(whole[:kept])
        with pytest.raises(Exception, match="(?i)safetensor|header|incomplete|metadata"):
            LocalTeacher(folder).prepare(accelerator, student())


def test_the_error_of_a_truncated_file_names_the_model(accelerator, folder, tmp_path):
    """Prevents a search for the broken file among all that a run reads."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(Exception) as caught:  # noqa: B017, PT011
        LocalTeacher(folder).prepare(accelerator, student())
    assert folder in str(caught.value)


def test_missing_weights_do_not_become_random_ones(accelerator, folder, tmp_path):
    """Prevents a file that lacks a layer from being filled with random weights under a mere warning."""
    from safetensors.torch import load_file, save_file

    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(Exception, match="up_proj"):
        LocalTeacher(folder).prepare(accelerator, student())


def test_pickled_weights_are_not_read(accelerator, folder, tmp_path):
    """Prevents a teacher's repository from running code through a pickle."""
    (tmp_path / "model.safetensors").unlink()
    torch.save(make_model(seed=1).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match="(?i)safetensors"):
        LocalTeacher(folder).prepare(accelerator, student())


def test_a_loaded_model_is_taken_as_it_is(accelerator, model):
    """Prevents a copy, which would take the teacher's memory twice."""
    teacher = LocalTeacher(model)
    teacher.prepare(accelerator, student())
    with teacher.weights() as spoken_with:
        assert spoken_with is model
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_student_given_as_its_own_teacher_is_not_frozen(accelerator, model):
    """Prevents a student from losing all its gradients because the same object was passed as the teacher."""
    try:
        LocalTeacher(model).prepare(accelerator, model)
    except ValueError:
        return
    assert any(parameter.requires_grad for parameter in model.parameters())


# -------------------------------------------------------------------------------- the same tokens


class Words:
    """Stands for a tokenizer: only the map is read."""

    def __init__(self, *tokens: str, **more: int) -> None:
        self.map = {token: index for index, token in enumerate(tokens)} | more

    def get_vocab(self) -> dict[str, int]:
        """Token to id."""
        return self.map


@pytest.mark.parametrize(
    "theirs",
    [Words("a", "b", "c"), Words("a", "b"), Words("a", "b", "c", "<pad>"), Words("a", "b", "c", added=300)],
    ids=["same", "shorter", "longer", "added far behind"],
)
def test_tails_that_only_one_has_are_let_pass(theirs):
    """Prevents models of one family, which differ in added tokens or padding, from being refused."""
    ours = Words("a", "b", "c")
    check_same_tokens(ours, theirs)
    check_same_tokens(theirs, ours)
    check_same_tokens(ours, ours)


def test_another_meaning_of_one_id_is_named():
    """Prevents two vocabularies of the same size from being taken for the same one: the run would train on the wrong
    tokens, silently.
    """
    with pytest.raises(VocabularyError, match="id 1 is 'b' for the student and 'x' for the teacher"):
        check_same_tokens(Words("a", "b", "c", "d"), Words("a", "x", "c", "y"))


def test_real_tokenizers_are_compared(tokenizer):
    """Prevents a comparison that works on stand-ins only."""
    check_same_tokens(tokenizer, make_tokenizer())
    longer = make_tokenizer()
    longer.add_tokens(["<tool>"])
    check_same_tokens(tokenizer, longer)
    other = copy.deepcopy(tokenizer)
    swapped = {token: index for token, index in tokenizer.get_vocab().items()}
    first, second = sorted(swapped, key=swapped.get)[20:22]
    swapped[first], swapped[second] = swapped[second], swapped[first]
    other.get_vocab = lambda: swapped
    with pytest.raises(VocabularyError, match="id 20 .*answer: teacher"):
        check_same_tokens(tokenizer, other)


# ------------------------------------------------------------------------------------ short forms


def test_short_forms(model):
    """Prevents "self" from being looked up on the hub, or from needing an adapter that isn't there."""
    assert as_teacher(None, adapter=True) is None
    assert as_teacher("self", adapter=True).kind == "adapter_off"
    assert as_teacher("self", adapter=False).kind == "frozen_copy"
    by_name, by_model = as_teacher("org/name", adapter=True), as_teacher(model, adapter=False)
    assert isinstance(by_name, LocalTeacher) and by_name.name == "org/name" and by_name.model is None
    assert isinstance(by_model, LocalTeacher) and by_model.model is model
    assert as_teacher(by_name, adapter=True) is by_name


def test_only_self_teachers_need_another_prompt():
    """Prevents a run in which a student is taught what it already says."""
    assert SelfTeacher("live").needs_second_view and not LocalTeacher("org/name").needs_second_view


def test_the_head_goes_with_the_weights(accelerator):
    """Prevents a frozen copy's states from being read with the head of the student, which has moved on."""
    learner, teacher = make_model(seed=0).train(), SelfTeacher("frozen_copy")
    teacher.prepare(accelerator, learner)
    rows = teacher.signal(batch_of(), NEEDS).rows
    assert rows.head.weight.data_ptr() != Head.of(learner).weight.data_ptr()
    assert SharedPrefix.MINIMUM == 32
