"""A cached teacher in training: the same update as the model that it was made of, refusals before the first step."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from caches import build, content, first_view, make_dataset, speaker
from conftest import make_model, make_tokenizer
from hub_server import hub_for
from rich.console import Console
from training import ROWS, make_trainer, run, trained_weights, worst_difference
from typer.testing import CliRunner

from hfkd import PromptStyle
from hfkd.batch import Batch
from hfkd.cache import CacheError, Hidden, Manifest, Sampled, TopK
from hfkd.cache.folder import alone_in
from hfkd.cli.main import app
from hfkd.hub import dataset_card, push_cache
from hfkd.recipe import load_recipe
from hfkd.record import OutputFolderError
from hfkd.run import caching, run_recipe
from hfkd.run.caching import build_cache
from hfkd.run.expected import expected_contract, name_of, teacher_contract
from hfkd.run.texts import answered_rows, answers_fingerprint, visited_rows
from hfkd.run.texts import make_dataset as make_views
from hfkd.signal import DISTRIBUTION
from hfkd.teachers import LocalTeacher
from hfkd.teachers.cached import CachedTeacher
from hfkd.teachers.several import RoutedTeacher

VERBS = ["walk", "talk", "jump", "look", "call", "ask", "work", "play", "help", "turn", "move", "live", "love", "use",
         "open", "close", "wash", "push", "pull", "cook"]  # fmt: skip


def local() -> LocalTeacher:
    return LocalTeacher(make_model(seed=1))


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of each kind of the sixteen words."""
    folder = tmp_path_factory.mktemp("caches")
    for name, codec in {
        "hidden": Hidden(),
        "topk": TopK(300),
        "all": TopK(384),
        "compact": TopK(384, True),
    }.items():
        build(folder / name, codec)
    return folder


# --- the same as the model


def test_hidden_trains_the_same_student(caches: Path, tmp_path: Path) -> None:
    """A cache that shifts rows, swaps texts or loses precision would train another student, quietly."""
    settings = {"max_steps": 20, "learning_rate": 0.1}
    trainers = [
        make_trainer(tmp_path / str(place), teacher=teacher, **settings)
        for place, teacher in enumerate((local(), CachedTeacher(caches / "hidden")))
    ]
    first = trained_weights(trainers[0])
    for trainer in trainers:
        trainer.train()
    ours, theirs = ([entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in trainers)
    assert len(ours) == 20 and ours[-1] < 0.75 * ours[0], "nothing was learned, so nothing is compared"
    assert theirs == pytest.approx(ours, rel=1e-5)
    after = [trained_weights(trainer) for trainer in trainers]
    assert worst_difference(after[0], first) > 1e-2
    assert worst_difference(*after) < 1e-5


@pytest.mark.parametrize(
    ("name", "loss", "update"), [("all", 1e-4, 2e-3), ("compact", 1e-3, 1e-2), ("topk", 2e-2, 5e-2)]
)
def test_topk_trains_nearly_the_same_student(
    caches: Path, tmp_path: Path, name: str, loss: float, update: float
) -> None:
    """What eight or sixteen bits cost, and what the 84 ids that are left out do (2.8 % of the mass), and no more."""
    ours, losses = run(tmp_path / "a", teacher=local())
    theirs, cached = run(tmp_path / "b", teacher=CachedTeacher(caches / name))
    assert cached == pytest.approx(losses, rel=loss) and cached != losses
    assert worst_difference(ours, theirs) < update


@pytest.mark.parametrize(
    "settings", [{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, {"seed": 9}]
)
def test_shuffling_and_accumulation_change_nothing(caches: Path, tmp_path: Path, settings: dict) -> None:
    """Rows that are found by their place in the data would be another text's as soon as the order changes."""
    ours, losses = run(tmp_path / "a", teacher=local(), **settings)
    theirs, cached = run(tmp_path / "b", teacher=CachedTeacher(caches / "hidden"), **settings)
    assert cached == pytest.approx(losses, rel=1e-5)
    assert worst_difference(ours, theirs) < 1e-4


@pytest.mark.parametrize("name", ["hidden", "topk", "all", "compact"])
def test_padding_is_no_part_of_a_text(caches: Path, name: str) -> None:
    """A batch that is padded on the left, or in another company, must find the same rows."""
    teacher, dataset = CachedTeacher(caches / name), make_dataset()
    teacher.prepare(_Machine(), torch.nn.Identity())
    view = first_view(dataset)
    rows = teacher.signal(Batch(view), frozenset({DISTRIBUTION})).rows
    exact = speaker(make_model(seed=1))(view)
    exact = torch.log_softmax(exact.head.logits(exact.hidden), dim=-1)
    if name == "hidden":
        torch.testing.assert_close(torch.log_softmax(rows.head.logits(rows.hidden), dim=-1), exact)
    else:
        torch.testing.assert_close(rows.log_probs, exact.gather(-1, rows.ids), rtol=0, atol=0.06)
    assert len(rows) == view.tokens


def test_texts_that_stream_are_looked_up(caches: Path, tmp_path: Path) -> None:
    """A data set that nobody can count is checked row by row, and a text that isn't there stops the run."""
    teacher = CachedTeacher(caches / "topk")
    teacher.prepare(_Machine(), torch.nn.Identity())
    other = make_dataset([{"prompt": "swim", "completion": "swam"}])
    with pytest.raises(CacheError, match="1 of 1 texts of the batch aren't in the cache"):
        teacher.signal(Batch(first_view(other, 1)), frozenset({DISTRIBUTION}))


class _Machine:
    device = torch.device("cpu")


# --- refused before the first step


def test_the_same_data_are_accepted_and_a_part_only_when_meant(caches: Path) -> None:
    """The order of the data is part of what a cache was made of; who trains on a part says so."""
    for rows, subset, words in (
        (ROWS[:16], False, None),
        (ROWS[:16][::-1], False, "data.sha256.*another order"),
        (ROWS[:16][::-1], True, None),
        (ROWS[:5], False, "data.sha256.*16 rows.*has 5.*subset=True"),
        (ROWS[:5], True, None),
        (ROWS[:17], True, "1 of 17 texts aren't in the cache.*training example 16"),
    ):
        teacher = CachedTeacher(caches / "topk", subset=subset)
        teacher.prepare(_Machine(), torch.nn.Identity())
        if words is None:
            teacher.meet(make_dataset(rows))
        else:
            with pytest.raises(CacheError, match=words):
                teacher.meet(make_dataset(rows))
    teacher.meet(make_dataset(ROWS[3:6]), training=False)
    with pytest.raises(CacheError, match="evaluation example 0"):
        teacher.meet(make_dataset(ROWS[16:]), training=False)


def _template():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    return make_dataset(tokenizer=tokenizer)


def _tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    return make_dataset(tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("field", "dataset"),
    [
        ("tokenizer", _tokenizer),
        ("template", _template),
        ("prompt", lambda: make_dataset(style=PromptStyle(system="Be brief."))),
        ("prompt", lambda: make_dataset(demonstrations=ROWS[16:17] * 4)),
    ],
)
def test_other_texts_are_named(caches: Path, field: str, dataset) -> None:
    """The student would learn from what the teacher said to another question."""
    teacher = CachedTeacher(caches / "topk", subset=True)
    teacher.prepare(_Machine(), torch.nn.Identity())
    with pytest.raises(CacheError, match=rf"\b{field}: the cache has"):
        teacher.meet(dataset())


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("teacher.revision", {"teacher": {"revision": "v2"}}),
        ("teacher.model", {"teacher": {"model": "another"}}),
        ("teacher.dtype", {"teacher": {"dtype": "bfloat16"}}),
        ("temperature", {"temperature": 2.0}),
        ("vocab_size", {"vocab_size": 400}),
        ("data.sha256", {"data": {"sha256": "0" * 64}}),
    ],
)
def test_another_contract_is_named(caches: Path, field: str, expected: dict) -> None:
    """A teacher of another revision or temperature is another teacher."""
    for expect in (
        lambda: CachedTeacher(caches / "topk", expected=expected).prepare(_Machine(), torch.nn.Identity()),
        lambda: CachedTeacher(caches / "topk").expect(expected),
    ):
        with pytest.raises(CacheError, match=rf"\b{field}: the cache has .* this run has"):
            expect()
    teacher = CachedTeacher(caches / "hidden", expected={"temperature": 2.0})
    teacher.prepare(_Machine(), torch.nn.Identity())  # hidden states serve any temperature


@pytest.mark.parametrize("damage", ["flip", "cut", "manifest", "head", "order"])
def test_damage_stops_the_run_before_the_first_step(tmp_path: Path, damage: str) -> None:
    """A run of a night on a damaged cache is a night lost; the message names what is wrong."""
    folder = tmp_path / "cache"
    build(folder, Hidden())
    shard, rows = folder / "part-00001.parquet", ROWS[:16]
    whole = shard.read_bytes()
    words = "part-00001.parquet"
    if damage == "flip":
        shard.write_bytes(whole[:99] + bytes([whole[99] ^ 64]) + whole[100:])
    elif damage == "cut":
        shard.write_bytes(whole[: len(whole) // 2])
    elif damage == "manifest":
        text = (folder / "manifest.json").read_text()
        (folder / "manifest.json").write_text(text.replace('"rows": 16', '"rows": 17'))
        words = "manifest.json was edited"
    elif damage == "head":
        content = (folder / "head.safetensors").read_bytes()
        (folder / "head.safetensors").write_bytes(content[:-4] + b"\0\0\0\x01")
        words = "head.safetensors"
    else:
        rows, words = rows[::-1], "data.sha256.*another order"
    with pytest.raises(CacheError, match=words):
        make_trainer(tmp_path / "run", teacher=CachedTeacher(folder), rows=rows)


def test_an_unfinished_cache_is_refused(tmp_path: Path) -> None:
    """Half a cache must not be taken for a small one."""
    build(tmp_path / "cache", TopK(16))
    manifest = Manifest.read(tmp_path / "cache")
    manifest.status = "building"
    manifest.write(tmp_path / "cache")
    with pytest.raises(CacheError, match="isn't finished.*goes on where it stopped"):
        make_trainer(tmp_path / "run", teacher=CachedTeacher(tmp_path / "cache"))
    with pytest.raises(CacheError, match="holds no cache.*hfkd cache"):
        CachedTeacher(tmp_path / "nothing")


def test_what_a_cache_cannot_do_is_said(caches: Path, tmp_path: Path) -> None:
    """Losses that need states, other temperatures or whole distributions are told what to do."""
    with pytest.raises(CacheError, match="no model that could write an answer"):
        CachedTeacher(caches / "topk").weights()
    with pytest.raises(ValueError, match="states"):
        make_trainer(
            tmp_path / "a",
            teacher=CachedTeacher(caches / "topk"),
            objective=[{"kind": "forward_kl"}, {"kind": "hidden_cosine"}],
        )
    folder = tmp_path / "sampled"
    build(folder, Sampled(20))
    with pytest.raises(ValueError, match=r"drawn ids only.*\['reverse_kl'\].*forward_kl"):
        make_trainer(tmp_path / "b", teacher=CachedTeacher(folder), objective=["forward_kl", "reverse_kl"])
    make_trainer(tmp_path / "c", teacher=CachedTeacher(folder), objective=["forward_kl", "cross_entropy"])
    described = CachedTeacher(caches / "topk").describe()
    assert described["kind"] == "cached" and described["codec"]["k"] == 300 and described["teacher"]["model"] == "tiny"
    assert str(caches) not in json.dumps(described)


@pytest.mark.parametrize("name", ["hidden", "topk", "compact"])
def test_a_batch_may_have_texts_without_a_token(caches: Path, name: str) -> None:
    """A text that was cut before its answer isn't in the cache, and nothing of it is asked for."""
    teacher = CachedTeacher(caches / name)
    teacher.prepare(_Machine(), torch.nn.Identity())
    view = first_view(make_dataset(), 3)
    labels = view.labels.clone()
    labels[1] = -100
    whole = teacher.signal(Batch(view), frozenset({DISTRIBUTION})).rows
    part = teacher.signal(Batch(replace(view, labels=labels)), frozenset({DISTRIBUTION})).rows
    counts = [int((row[1:] != -100).sum()) for row in view.labels]
    others = [*range(counts[0]), *range(counts[0] + counts[1], sum(counts))]
    shown = "hidden" if name == "hidden" else "log_probs"
    assert torch.equal(getattr(part, shown), getattr(whole, shown)[others])
    none = teacher.signal(Batch(replace(view, labels=torch.full_like(labels, -100))), frozenset({DISTRIBUTION})).rows
    assert len(none) == 0


def test_a_cache_among_several_teachers(caches: Path, tmp_path: Path) -> None:
    """The number of ids of a member without a model was asked of its model, and the run failed."""
    rows = [{**row, "teacher": "ab"[place % 2]} for place, row in enumerate(ROWS[:16])]
    losses = []
    for first in (local(), CachedTeacher(caches / "hidden", subset=True)):
        teacher = RoutedTeacher({"a": first, "b": LocalTeacher(make_model(seed=2))})
        losses.append(run(tmp_path / str(len(losses)), teacher=teacher, rows=rows)[1])
    assert CachedTeacher(caches / "hidden").vocab_size == 384
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_ids_that_the_student_does_not_score_are_named(tmp_path: Path) -> None:
    """ "The token id 447 is to be learned" sends the reader to the data, and the data are right."""
    build(tmp_path / "cache", TopK(448), model=make_model(seed=1, vocab_size=448))
    trainer = make_trainer(tmp_path / "run", teacher=CachedTeacher(tmp_path / "cache"))
    with pytest.raises(ValueError, match="sparse rows list the token id 447, but the student scores 384"):
        trainer.train()


# --- recipes and the command


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a student, a teacher, data and a recipe."""
    monkeypatch.chdir(tmp_path)
    for name, seed in (("model", 0), ("big", 1)):
        make_model(seed=seed).save_pretrained(name)
        make_tokenizer().save_pretrained(name)
    rows = [{"prompt": verb, "completion": verb + "ed"} for verb in VERBS]
    Path("verbs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "student": {"model": "model", "lora": {"r": 2, "alpha": 4}},
        "teacher": {"kind": "self"},
        "data": {
            "train": {"path": "verbs.jsonl"},
            "demonstrations": {"count": 4},
            "generation": {"max_new_tokens": 4},
        },
        "training": {"output_dir": "out", "max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


LOCAL = ("teacher.kind=local", "teacher.model=big")


def make(out: str, *overrides: str, codec=None, **settings) -> tuple[Manifest, str]:
    """Build by the recipe; returns what was printed too."""
    words = io.StringIO()
    console = Console(file=words, width=300)
    recipe = load_recipe("recipe.yaml", list(overrides))
    return build_cache(recipe, out, codec or TopK(16), console=console, **settings), words.getvalue()


@pytest.mark.parametrize("overrides", [(), LOCAL, ("data.answer=teacher", *LOCAL)], ids=["self", "local", "answers"])
def test_a_recipe_builds_what_its_run_expects(folder: Path, overrides: tuple[str, ...]) -> None:
    """Command and run must mean the same texts by the same recipe, or no cache would ever be accepted."""
    manifest, words = make("cache", *overrides)
    assert "tokens per second" in words and manifest.status == "complete"
    answers = "data.answer=teacher" in overrides
    assert manifest.build["rows"] == (4 if answers else 16), (
        "all rows that can be examples, or those that are answered"
    )
    assert (folder / "cache" / "teacher_answers.jsonl").exists() == answers
    told = caching._without_models(load_recipe("recipe.yaml", list(overrides)))
    told.teacher = CachedTeacher("cache", subset=True)
    _, dataset = caching.fitting(told)
    told.teacher.expect(expected_contract(told, dataset))
    before = (folder / "cache" / "manifest.json").read_bytes()
    _, words = make("cache", *overrides)
    assert "already complete" in words and "tokens per second" not in words
    assert (folder / "cache" / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("overrides", [(), LOCAL, ("data.answer=teacher", *LOCAL)], ids=["self", "local", "answers"])
def test_a_run_with_a_cache_is_the_run_without(
    folder: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...]
) -> None:
    """`teacher.cache` must change where the teacher speaks and nothing that it says; the model is not loaded."""
    settings = (*overrides, "training.logging_steps=1", "training.disable_tqdm=true")
    make("cache", *overrides, codec=Hidden())
    before = content(folder / "cache")
    plain = _losses(*settings, "training.output_dir=plain")
    monkeypatch.setattr(LocalTeacher, "prepare", lambda *_: pytest.fail("the teacher was loaded"))
    cached = _losses(*settings, "training.output_dir=cached", "teacher.cache=cache")
    assert len(plain) == 2 and cached == pytest.approx(plain, rel=1e-5)
    assert content(folder / "cache") == before, "a cache is read, and nothing is written into it"
    record = json.loads(Path("cached/run.json").read_text())
    assert record["teacher"]["kind"] == "cached" and record["teacher"]["codec"]["kind"] == "hidden"
    with pytest.raises(CacheError, match=r"\bprompt: the cache has"):
        _losses(*settings, "training.output_dir=other", "teacher.cache=cache", "data.prompt.system=Be brief.")


def _losses(*overrides: str) -> list[float]:
    result = run_recipe(load_recipe("recipe.yaml", list(overrides)), console=Console(file=io.StringIO()))
    return [entry["loss"] for entry in result.report["loss_history"]]


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (LOCAL, "teacher.kind"),
        (("student.dtype=bfloat16",), "teacher.dtype"),
        (("data.prompt.system=Be brief.",), "prompt"),
        (("data.demonstrations.count=3",), "data.rows"),
        (("loss.terms=[{kind: forward_kl, temperature: 2.0}]",), "temperature"),
    ],
)
def test_another_recipe_is_refused(folder: Path, overrides: tuple[str, ...], field: str) -> None:
    """A recipe that was changed since the cache was built is found out, and --overwrite is the way to a new one."""
    make("cache")
    with pytest.raises(CacheError, match=rf"\b{field}: the cache has"):
        make("cache", *overrides)
    manifest, _ = make("cache", *overrides, overwrite=True)
    assert manifest.status == "complete"


ANSWERS = ("data.answer=teacher", *LOCAL)


def test_more_steps_leave_a_finished_cache_as_it_is(folder: Path) -> None:
    """New answers were written into a cache that was complete, and then the build failed."""
    make("cache", *ANSWERS)
    before = content(folder / "cache")
    with pytest.raises(ValueError, match="lacks the teacher's answers to .* of .* prompts"):
        make("cache", *ANSWERS, "training.max_steps=4")
    with pytest.raises(ValueError, match="lacks the teacher's answers to .* of .* prompts"):
        _losses(*ANSWERS, "training.max_steps=4", "teacher.cache=cache", "training.output_dir=more")
    assert content(folder / "cache") == before
    manifest, _ = make("cache", *ANSWERS, "training.max_steps=4", overwrite=True)
    assert manifest.build["rows"] == 8


def test_overwrite_leaves_a_runs_answers(folder: Path) -> None:
    """In the folder of a run `--overwrite` took the answers along that an hour of the run had written."""
    make("out")
    Path("out/teacher_answers.jsonl").write_text("the run's")
    make("out", codec=TopK(17), overwrite=True)
    assert Path("out/teacher_answers.jsonl").read_text() == "the run's"


def test_a_cache_with_answers_may_be_moved(folder: Path) -> None:
    """The answers were tied to the path of the teacher's folder, so no other machine could read them."""
    make("cache", *ANSWERS)
    shutil.copytree("big", "far/away/big")
    shutil.rmtree("big")
    shutil.move("cache", "moved")
    assert str(folder) not in (folder / "moved" / "teacher_answers.jsonl").read_text()
    _losses(*ANSWERS, "teacher.model=far/away/big", "teacher.cache=moved", "training.output_dir=a")


def test_a_cache_of_answers_has_no_order(folder: Path) -> None:
    """Without `subset` the order was looked up in a contract that has none."""
    make("cache", *ANSWERS, codec=Hidden())
    told = caching._without_models(load_recipe("recipe.yaml", list(ANSWERS)))
    told.teacher = CachedTeacher("cache", subset=False)
    told.teacher.prepare(_Machine(), torch.nn.Identity())
    rows = visited_rows(told, caching.fitting(told)[0])
    answered = answered_rows(told, rows, Path("cache"), written=True)
    told.teacher.meet(make_views(told, answered, told.teacher, told.objective))


def test_a_run_goes_on_with_a_cache_that_was_moved(folder: Path) -> None:
    """The place of a cache decides no weight, its bytes do: the first may change, the second may not."""
    make("cache")
    make("other", codec=TopK(17))
    settings = ("training.save_steps=1", "training.logging_steps=1")
    straight = _losses(*settings, "teacher.cache=cache")
    shutil.rmtree("out/checkpoint-2")
    shutil.move("cache", "moved")
    resume = (*settings, "training.run_policy=resume")
    with pytest.raises(OutputFolderError, match="teacher.cache is not the cache that"):
        _losses(*resume, "teacher.cache=other")
    with pytest.raises(OutputFolderError, match="another recipe"):
        _losses(*resume)
    assert _losses(*resume, "teacher.cache=moved") == pytest.approx(straight, rel=1e-6)


@pytest.mark.parametrize(
    ("terms", "codec", "words"),
    [
        ("[{kind: forward_kl}, {kind: reverse_kl}]", Sampled(20), r"\['reverse_kl'\] read whole distributions"),
        ("[{kind: forward_kl}, {kind: hidden_cosine}]", Hidden(), r"\['hidden_cosine'\] read the states"),
        ("[{kind: forward_kl}]", TopK(500), "codec.k is 500.*384"),
    ],
)
def test_a_cache_that_nobody_could_read_is_not_built(folder: Path, terms: str, codec, words: str) -> None:
    """A night of a teacher, and the run that it was for is refused in the morning."""
    with pytest.raises(ValueError, match=words):
        make("cache", *LOCAL, f"loss.terms={terms}", codec=codec)
    assert not Path("cache").exists()


def test_two_builds_of_a_recipe_do_not_meet(folder: Path) -> None:
    """The second one says why it doesn't begin; a finished cache is no build, and may lie where nobody writes."""
    with alone_in(folder / "cache"), pytest.raises(CacheError, match="Another build runs in cache"):
        make("cache")
    make("cache")
    with alone_in(folder / "cache"):
        assert "already complete" in make("cache")[1]
    Path("file").write_text("mine")
    with pytest.raises(CacheError, match="--out: file is a file"):
        make("file")


def test_how_a_teacher_is_loaded_is_part_of_it(folder: Path) -> None:
    """An argument that only one side has was not compared, so that another teacher was accepted; where its files are
    fetched is nobody's business.
    """
    kwargs = "teacher.load_kwargs={attn_implementation: eager}"
    manifest, _ = make("cache", *LOCAL, kwargs)
    assert manifest.contract["teacher"]["load_kwargs"] == {"attn_implementation": "eager"}
    for other in ((), ("teacher.load_kwargs={attn_implementation: eager, subfolder: .}",)):
        with pytest.raises(CacheError, match=r"teacher.load_kwargs: the cache has {'attn_implementation': 'eager'}"):
            _losses(*LOCAL, *other, "teacher.cache=cache")
    fetched = "{attn_implementation: eager, cache_dir: /home/me, local_files_only: true, token: x, device_map: auto}"
    recipe = load_recipe("recipe.yaml", [*LOCAL, f"teacher.load_kwargs={fetched}"])
    assert teacher_contract(recipe) == manifest.contract["teacher"]
    assert answers_fingerprint(recipe)["load_kwargs"] == {"attn_implementation": "eager"}


def test_a_part_of_a_folder_is_known_by_its_own_weights(folder: Path) -> None:
    """With `subfolder` the weights that were hashed weren't those that are loaded; files beside them don't count."""
    for name, seed in (("a", 1), ("b", 2)):
        make_model(seed=seed).save_pretrained(folder / "all" / name)
    names = {name_of("all", part) for part in ("a", "b")}
    assert len(names) == 2 and all(name.startswith("all@") for name in names)
    parts = [f"teacher.load_kwargs={{subfolder: {part}}}" for part in ("a", "b")]
    recipes = [load_recipe("recipe.yaml", ["teacher.kind=local", "teacher.model=all", part]) for part in parts]
    assert {teacher_contract(recipe)["model"] for recipe in recipes} == names
    assert {answers_fingerprint(recipe)["model"] for recipe in recipes} == names
    for name in ("config.json", "generation_config.json", "training_args.bin", "optimizer.bin"):
        (folder / "all" / "a" / name).write_text('{"saved": "anew"}')
    assert name_of("all", "a") in names


def test_a_teacher_that_was_trained_on_is_another_one(folder: Path) -> None:
    """The same folder with other weights in it: its name alone proves nothing."""
    before = name_of("big")
    assert before.startswith("big@") and str(folder) not in before
    make_model(seed=2).save_pretrained("big")
    assert name_of("big") != before
    assert name_of("owner/name") == "owner/name"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("teacher.weights=live",), "weights: live can't be cached"),
        (("teacher.kind=none", "loss.terms=[{kind: cross_entropy}]"), "none can't be cached"),
    ],
)
def test_a_teacher_that_changes_is_refused(folder: Path, overrides: tuple[str, ...], words: str) -> None:
    """What is said once is not what a moving teacher says later."""
    with pytest.raises(ValueError, match=words):
        make("cache", *overrides)


def test_two_temperatures_need_hidden_states(folder: Path) -> None:
    """Probabilities at one temperature can't be turned into those at another."""
    terms = "loss.terms=[{kind: forward_kl, temperature: 2.0}, {kind: reverse_kl}]"
    with pytest.raises(ValueError, match=r"temperatures \[1.0, 2.0\].*--codec hidden"):
        make("cache", terms)
    manifest, _ = make("cache", terms, codec=Hidden())
    assert manifest.contract["temperature"] is None
    with pytest.raises(ValueError, match="leave it out"):
        make("other", codec=Hidden(), temperature=1.0)


def test_a_padded_vocabulary_is_cut_to_the_students(folder: Path) -> None:
    """Ids that only the teacher's padding has can't be looked up in the student's logits."""
    make_model(seed=1, vocab_size=448).save_pretrained("big")
    manifest, _ = make("cache", *LOCAL, codec=Hidden())
    assert manifest.contract["vocab_size"] == 384


def test_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a user types, from the options to the upload; a wrong option is said before anything is loaded."""
    with hub_for(folder, monkeypatch) as hub:
        line = ["cache", "recipe.yaml", "--out", "cache", "--codec", "sampled", "--rounds", "20", "--compact"]
        result = CliRunner().invoke(app, [*line, "--push", "me/cache", "student.dtype=float32"])
        assert result.exit_code == 0, result.output
        assert Manifest.read(folder / "cache").contract["codec"]["rounds"] == 20
        assert hub.repositories["dataset", "me/cache"].private and "Made me/cache, private." in result.output
        sent = hub.files("me/cache", "dataset")
        assert sent["part-00000.parquet"] == (folder / "cache/part-00000.parquet").read_bytes()
        assert not (folder / "cache" / "README.md").exists(), "a run's own card may lie there"
        misspelt = CliRunner().invoke(app, [*line, "--push", "cache"])
        assert misspelt.exit_code == 2 and "Expected owner/name" in " ".join(misspelt.output.split())
    wrong = CliRunner().invoke(app, ["cache", "recipe.yaml", "--out", "x", "--codec", "hidden", "--k", "3"])
    assert wrong.exit_code == 2 and "--k belongs to --codec topk" in wrong.output
    other = CliRunner().invoke(app, [*line[:4], "--k", "3"])
    assert other.exit_code == 2 and "codec.kind: the cache has 'sampled'" in other.output


def test_an_unfinished_cache_is_not_pushed(folder: Path) -> None:
    """Half a cache on the hub would be taken for a whole one by everybody else."""
    manifest, _ = make("cache")
    card = dataset_card(manifest)
    assert "| Supervised tokens | " in card and "None" not in card
    assert "error\\| <= 2^-11 \\|log p\\| |" in card, "a bar ends a cell"
    manifest.status = "building"
    manifest.write(folder / "cache")
    with pytest.raises(CacheError, match="isn't finished"):
        push_cache("cache", "me/cache")
