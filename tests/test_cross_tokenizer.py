"""A teacher with another tokenizer: its rows beside the student's, and a run with it."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from conftest import make_model, make_tokenizer
from reference_measures import coins, yes_and_no
from test_cross_tokenizer_alignment import unigram
from torch import Tensor
from training import make_trainer, worst_difference
from transformers import PreTrainedTokenizerBase

from hfkd import DistillationConfig, DistillationTrainer
from hfkd.batch import Batch, predicted
from hfkd.data.collate import DistillationCollator
from hfkd.data.prompts import PromptBuilder, PromptStyle
from hfkd.data.views import DistillationDataset
from hfkd.objective import build_objective
from hfkd.rows import DenseRows, Head
from hfkd.signal import DISTRIBUTION, TeacherSignal
from hfkd.teacher_rows import AlignedRows
from hfkd.teachers.cross_tokenizer import CrossTokenizerTeacher, text_log_probs

NEEDS = frozenset({DISTRIBUTION})
WORDS = "walk jump sing ring bake play open close paint move start carry talk dance laugh cook".split()
ROWS = [{"prompt": word, "completion": f"{word}ed and {word}ing {place}"} for place, word in enumerate(WORDS)]
SHOWN = [{"prompt": "ask", "completion": "asked and asking"}, {"prompt": "go", "completion": "went"}]


def make_teacher(tokenizer: PreTrainedTokenizerBase | None = None, **options) -> CrossTokenizerTeacher:
    """A small model of another width with the unigram tokenizer's vocabulary."""
    tokenizer = tokenizer or unigram()
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32}
    return CrossTokenizerTeacher(make_model(seed=1, **sizes), tokenizer=tokenizer, **options)


def prepared(teacher: CrossTokenizerTeacher) -> CrossTokenizerTeacher:
    teacher.prepare(Accelerator(cpu=True), make_model())
    return teacher


def make_data(teacher: PreTrainedTokenizerBase, style: str = "text", rows=ROWS[:4], **settings) -> DistillationDataset:
    builders = [PromptBuilder(tokenizer, PromptStyle(style=style)) for tokenizer in (make_tokenizer(), teacher)]
    return DistillationDataset(rows, builders[0], teacher_builder=builders[1], **settings)


def batch_of(data: DistillationDataset, side: str = "right") -> Batch:
    collator = DistillationCollator(data.builder.tokenizer.pad_token_id, side)
    return Batch.from_inputs(collator([data[place] for place in range(len(data))]))


def dense_log_probs(model, view) -> Tensor:
    """[B, T] in float64 what a model says of each token of a view, row by row without padding; 0 of the first."""
    found = torch.zeros(view.labels.shape, dtype=torch.float64)
    for place in range(len(found)):
        real = view.attention_mask[place] == 1
        ids = view.input_ids[place][real]
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0].double()
        said = torch.log_softmax(logits, -1)[:-1].gather(-1, ids[1:, None])[:, 0]
        found[place][real] = torch.cat([said.new_zeros(1), said])
    return found


# --- the teacher's rows


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("style", ["text", "chat"])
@pytest.mark.parametrize("reuse", [True, False])
def test_rows_beside_the_student(side, style, reuse):
    """Prevents the off-by-one of half the field (P20): the teacher's row one token too early or too late, or another
    row's, with padding on either side and a prefix that was run once.
    """
    teacher = prepared(make_teacher(reuse_prefix=reuse))
    data = make_data(teacher.tokenizer, style, demonstrations=SHOWN)
    batch = batch_of(data, side)
    teacher.share_prefix(data.shared_prefix)
    assert (teacher.prefix is not None) == reuse
    rows = teacher.signal(batch, NEEDS).rows
    assert isinstance(rows, AlignedRows) and len(rows) == batch.student.tokens
    said = dense_log_probs(teacher.model, batch.teacher)
    logits = rows.rows.head.logits(rows.rows.hidden).double()
    ours = (predicted(batch.student.labels).nonzero() + torch.tensor([0, 1])).tolist()
    before, begun = None, 0
    for number, (row, position) in enumerate(ours):
        span = int(batch.student_span[row, position])
        if span < 0:
            assert rows.place[number] == -1 and rows.span_log_probs[number] == 0
            assert number == 0 or rows.span[number] == rows.span[number - 1] + 1
            before = None
            continue
        theirs = (batch.teacher_span[row] == span).nonzero()[:, 0]
        torch.testing.assert_close(rows.span_log_probs[number].double(), said[row, theirs].sum(), rtol=1e-4, atol=1e-4)
        if (row, span) == before:
            assert rows.place[number] == -1 and rows.span[number] == rows.span[number - 1]
            continue
        begun += 1
        first = int(theirs[0])
        own = torch.log_softmax(logits[rows.place[number]], -1)[batch.teacher.input_ids[row, first]]
        torch.testing.assert_close(own, said[row, first], rtol=1e-4, atol=1e-4)
        assert number == 0 or rows.span[number] == rows.span[number - 1] + 1
        before = (row, span)
    assert begun > 20 and rows.span[0] == 0 and len(rows.rows) > begun


def test_the_text_is_read_a_few_rows_at_a_time(monkeypatch):
    """Prevents a logits tensor of all rows, and a chunk whose rows meet the ids of another."""
    rows = DenseRows(torch.randn(23, 8), Head(torch.randn(11, 8), torch.randn(11)))
    targets = torch.randint(11, (23,))
    expected = torch.log_softmax(rows.head.logits(rows.hidden), -1).gather(-1, targets[:, None])[:, 0]
    for values in (1, 55, 2**20):
        monkeypatch.setattr("hfkd.teachers.cross_tokenizer._VALUES", values)
        torch.testing.assert_close(text_log_probs(rows, targets), expected)
    assert text_log_probs(DenseRows(rows.hidden[:0], rows.head), targets[:0]).shape == (0,)
    half = DenseRows(rows.hidden.bfloat16(), Head(rows.head.weight.bfloat16()))
    assert text_log_probs(half, targets).dtype == torch.float32


def test_what_a_teacher_with_another_tokenizer_needs():
    """Prevents a run that stops at its first batch, or reads the student's ids with the teacher's words."""
    with pytest.raises(ValueError, match="without it; pass tokenizer="):
        CrossTokenizerTeacher(make_model())
    ids = len(unigram())
    with pytest.raises(ValueError, match=f"writes {ids} ids, but the teacher can read the first {ids - 1} only"):
        prepared(CrossTokenizerTeacher(make_model(vocab_size=ids - 1), tokenizer=unigram()))
    teacher = prepared(make_teacher())
    batch = batch_of(make_data(teacher.tokenizer))
    with pytest.raises(ValueError, match="needs its own view of each text and the spans of both"):
        teacher.signal(Batch(batch.student, batch.teacher), NEEDS)
    other = batch.teacher_span.clone()
    other[other == 0] = -1
    with pytest.raises(ValueError, match="spans and the teacher's"):
        teacher.signal(Batch(batch.student, batch.teacher, student_span=batch.student_span, teacher_span=other), NEEDS)
    described = teacher.describe()
    assert described["kind"] == "cross_tokenizer" and teacher.other_vocabulary and teacher.provides == NEEDS


@pytest.mark.parametrize("kind", ["uld", "span_likelihood"])
def test_the_same_tokenizer_gives_the_plain_loss(kind):
    """Prevents a cross-tokenizer loss that is another one where both tokenizers are the same and nothing is lost."""
    tokenizer = make_tokenizer()
    teacher = prepared(CrossTokenizerTeacher(make_model(seed=1), tokenizer=tokenizer))
    batch = batch_of(make_data(tokenizer))
    signal = teacher.signal(batch, NEEDS)
    rows, targets = signal.rows, batch.student.targets
    assert rows.place.tolist() == rows.span.tolist() == list(range(len(targets)))
    states = torch.randn(len(targets), 32, generator=torch.Generator().manual_seed(0))
    outcomes = []
    for theirs in (rows, rows.rows):
        leaf = states.clone().requires_grad_(True)
        terms = [{"kind": kind}, {"kind": "cross_entropy", "weight": 1e-9}]
        total = build_objective(terms)(DenseRows(leaf, Head.of(make_model())), TeacherSignal(theirs), targets).total
        outcomes.append((total, torch.autograd.grad(total, leaf)[0]))
    (aligned, first), (plain, second) = outcomes
    assert first.abs().max() > 1e-3
    torch.testing.assert_close(aligned, plain, rtol=1e-5, atol=0)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-4 * float(second.abs().max()))
    if kind == "span_likelihood":
        logits = Head.of(make_model()).logits(states)
        sides = [yes_and_no(x, targets, 1.0) for x in (rows.rows.head.logits(rows.rows.hidden), logits)]
        torch.testing.assert_close(aligned.double(), coins(*sides).sum(), rtol=1e-5, atol=0)


# --- training


TERMS = [{"kind": "uld", "weight": 0.5}, {"kind": "span_likelihood"}]


def train(folder, **overrides) -> tuple[dict[str, Tensor], list[float]]:
    teacher = make_teacher()
    settings = {"objective": TERMS, "teacher": teacher, "rows": ROWS, "demonstrations": SHOWN, "learning_rate": 0.05}
    trainer = make_trainer(folder, **(settings | overrides))
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    update = {name: value.detach() - before[name] for name, value in trainer.model.named_parameters()}
    return update, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_student_learns_from_a_teacher_with_another_tokenizer(tmp_path):
    """Prevents plumbing that runs and teaches nothing: texts, spans, rows, losses and gradients in one."""
    _, losses = train(tmp_path, max_steps=12, learning_rate=1.0, max_grad_norm=1.0)
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4]), losses


def test_accumulation_changes_nothing(tmp_path):
    """Prevents a cross-tokenizer loss that is multiplied by the number of micro-batches (TRL's GOLD, P2)."""
    large = {"learning_rate": 1.0}  # an update that is large beside the rounding of the weights that it is read off
    whole, first = train(tmp_path / "a", per_device_train_batch_size=8, **large)
    parts, second = train(tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=4, **large)
    assert max(float(value.abs().max()) for value in whole.values()) > 1e-6
    assert worst_difference(whole, parts) < 1e-4
    assert first == pytest.approx(second, rel=1e-4)


@pytest.mark.parametrize("objective", ["forward_kl", [*TERMS, {"kind": "sinkhorn", "weight": 0.1}]])
def test_losses_that_need_one_vocabulary_are_refused(tmp_path, objective):
    """Prevents a divergence between id 7 of one vocabulary and id 7 of another."""
    with pytest.raises(
        ValueError, match=r"vocabulary of its own, and the terms .* id by id. Use uld or span_likelihood"
    ):
        train(tmp_path, objective=objective)


def test_cross_entropy_may_stand_beside(tmp_path):
    """Prevents a check that refuses the one term that asks no teacher, and an evaluation that lacks the spans."""
    _, losses = train(tmp_path, objective=[*TERMS, {"kind": "cross_entropy", "weight": 0.1}], max_steps=1)
    assert len(losses) == 1
    trainer = DistillationTrainer(
        make_model(),
        make_teacher(),
        TERMS,
        DistillationConfig(output_dir=str(tmp_path / "e"), use_cpu=True, report_to=[], disable_tqdm=True),
        train_dataset=ROWS[:8],
        eval_dataset=ROWS[8:12],
        processing_class=make_tokenizer(),
    )
    found = trainer.evaluate()
    assert found["eval_loss"] > 0 and not any("agreement" in name for name in found)
