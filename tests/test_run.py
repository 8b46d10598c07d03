"""Whole runs of a recipe on a tiny model: what is refused before a model is loaded, and what a run leaves behind."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_model, make_tokenizer
from huggingface_hub import ModelCard
from rich.console import Console

import hfkd.run.build
import hfkd.run.conduct
import hfkd.run.outcome
import hfkd.trainer
from hfkd.config import DistillationConfig
from hfkd.errors import CheckpointError, VocabularyError
from hfkd.recipe import RecipeError, load_recipe
from hfkd.record import OutputFolderError
from hfkd.run import run_recipe
from hfkd.run.build import build
from hfkd.run.evaluation import evaluate_recipe

VERBS = ["walk", "talk", "jump", "look", "call", "ask", "work", "play", "help", "turn", "move", "live", "love", "use",
         "open", "close", "wash", "push", "pull", "cook"]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model, data and a recipe of a second's length."""
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained("model")
    make_tokenizer().save_pretrained("model")
    rows = [{"prompt": verb, "completion": verb + "ed"} for verb in VERBS]
    Path("verbs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("other.jsonl").write_text("".join(json.dumps({"prompt": v + "s", "completion": v}) + "\n" for v in VERBS))
    recipe = {
        "student": {"model": "model", "lora": {"r": 2, "alpha": 4}},
        "teacher": {"kind": "self"},
        "data": {
            "train": {"path": "verbs.jsonl"},
            "demonstrations": {"count": 4},
            "student_shots": [0, 1],
            "generation": {"max_new_tokens": 4},
        },
        "evaluation": {"shots": [0, 2], "size": 4, "max_new_tokens": 3},
        "training": {
            "output_dir": "out",
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "use_cpu": True,
            "learning_rate": 0.01,
            "disable_tqdm": True,
        },
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def run(*overrides: str, words: io.StringIO | None = None):
    console = Console(file=words or io.StringIO(), width=200)
    return run_recipe(
        load_recipe("recipe.yaml", overrides), console=console, command=["/x/hfkd", "train", "recipe.yaml"]
    )


def refuse_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(hfkd.run.build, "load_student", loaded)


def test_a_whole_run(folder: Path) -> None:
    """The main job: a self-teacher's answers, training, both evaluations, the comparisons and every promised file."""
    words = io.StringIO()
    result = run(
        "data.answer=teacher",
        "evaluation.gold_baseline=true",
        "evaluation.forgetting=[{path: other.jsonl, size: 3, demonstrations: 2}]",
        words=words,
    )
    out = folder / "out"
    names = {path.name for path in out.iterdir()}
    assert {"run.json", "report.json", "report.html", "README.md", "recipe.yaml", "teacher_answers.jsonl"} <= names
    assert {"plots", "predictions.jsonl"} <= names
    assert {"loss.png", "accuracy.png", "reliability.png", "agreement.png"} <= {
        path.name for path in (out / "plots").iterdir()
    }
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    report = json.loads((out / "report.json").read_text())
    assert report["k_shot"].keys() == {"before", "after", "gold"}
    assert all(scores.keys() == {"0", "2"} and max(scores.values()) <= 1 for scores in report["k_shot"].values())
    assert report["k_shot_details"]["after"]["0"].keys() >= {
        "standard_error",
        "most_frequent_share",
        "distinct_answers",
    }
    assert report["forgetting"][0]["k_shot"].keys() == {"before", "after", "gold"}
    assert [entry["step"] for entry in report["loss_history"]] == [1, 2]
    assert report["fidelity"].keys() == {"before", "after"}
    assert report["fidelity"]["before"]["texts"] == 4 and report["fidelity"]["before"]["forward_kl"] > 0
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert {(line["stage"], line["shots"]) for line in lines} >= {("before", 0), ("after", 2), ("gold", 0)}
    right = [
        line["right"]
        for line in lines
        if (line["task"], line["stage"], line["shots"]) == (lines[0]["task"], "after", 2)
    ]
    assert sum(right) / len(right) == report["k_shot"]["after"]["2"]
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["command"] == ["hfkd", "train", "recipe.yaml"]
    assert record["teacher"]["weights"] == "adapter_off"
    assert record["objective"][0]["formula"].startswith("KL(") and "arxiv" in record["objective"][0]["paper"]
    assert 0 < record["parameters"]["trained"] < record["parameters"]["total"]
    assert record["origins"]["student"]["source"] == "folder"
    assert record["data"]["train"]["rows"] == len(VERBS) - 4 - 4
    assert record["data"]["training_examples"]["examples"] > 0
    assert ModelCard((out / "README.md").read_text()).data.library_name == "peft"
    text = words.getvalue()
    assert "the student itself with its adapter switched off; it reads 4 demonstrations, the student 0 or 1" in text
    assert text.index("Training    2 steps of 2 examples") < text.index("before: 0-shot")
    table = text[text.index("Accuracy on held-out items (4), %") :]
    assert all(column in table for column in ("Before", "After", "Gold labels", "Distinct answers"))
    assert "Not trained: other (3), %" in table
    assert result.report == report


def test_the_adapter_is_what_was_evaluated(folder: Path) -> None:
    """An adapter that doesn't answer as the report says is a report of another model."""
    report = run().report
    recipe = load_recipe("recipe.yaml")
    console = Console(file=io.StringIO())
    with_adapter = evaluate_recipe(recipe, adapter=Path("out"), json_path=Path("scores.json"), console=console)
    without = evaluate_recipe(recipe, console=console)
    details = report["k_shot_details"]
    assert with_adapter["results"]["after"]["k_shot"]["result"]["details"] == details["after"]
    assert without["results"]["before"]["k_shot"]["result"]["details"] == details["before"]
    kept = json.loads(Path("scores.json").read_text())["results"]["after"]["k_shot"]["result"]
    assert kept["k_shot"] == report["k_shot"]["after"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["teacher={kind: none}", "loss.terms=[{kind: cross_entropy}]"],
        ["teacher={kind: local, model: model}"],
        ["teacher={kind: local, model: model}", "data.answer=teacher", "evaluation=null"],
        ["teacher.weights=frozen_copy", "student.lora=null", "data.answer=teacher"],
        ["teacher.weights=live", "loss.chunk_size=1"],
        ["loss.terms=[{kind: cross_entropy}]", "data.answer=teacher", "data.whole_text=true"],
        ["data.demonstrations={count: 3, path: other.jsonl}"],
        ["evaluation.path=other.jsonl", "evaluation.split=train"],
        ["training.max_steps=-1", "training.num_train_epochs=0.2"],
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_kinds_of_runs(folder: Path, overrides: list[str]) -> None:
    """Each teacher and source of the schema must be wired to what it names."""
    result = run(*overrides)
    assert result.record.status == "finished"
    losses = [entry["loss"] for entry in result.report["loss_history"]]
    assert losses and all(loss == loss for loss in losses)
    if "model: model" in overrides[0] and "evaluation=null" not in overrides:
        assert result.report["k_shot"]["teacher"].keys() == {"2"}


def test_only_what_is_visited_is_answered(folder: Path) -> None:
    """A teacher that answers a million prompts for thirty steps costs hours for nothing."""
    run("data.answer=teacher", "training.max_steps=1", "evaluation=null")
    lines = (folder / "out" / "teacher_answers.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 2


@pytest.mark.parametrize("kind", ["recipes", "folder"])
def test_a_used_folder_is_refused_before_a_model_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Two runs in one folder leave weights that neither record describes."""
    out = folder / "out"
    (out / "checkpoint-2").mkdir(parents=True) if kind == "folder" else run("evaluation=null")
    refuse_models(monkeypatch)
    with pytest.raises(OutputFolderError, match="out holds another run; choose another training.output_dir"):
        run()
    differs = r"these keys differ: evaluation \(was null, is .*, training.learning_rate \(was 0.01, is 1\)"
    with pytest.raises(OutputFolderError, match=differs if kind == "recipes" else "no run.json"):
        run("training.run_policy=resume", "training.learning_rate=1")


def test_overwrite_starts_anew(folder: Path) -> None:
    """A checkpoint of the old run left behind would be resumed into the new one."""
    run("evaluation=null", "training.save_steps=1")
    assert (folder / "out" / "checkpoint-2").exists()
    (folder / "out" / "notes.txt").write_text("mine")
    run("evaluation=null", "training.run_policy=overwrite", "training.learning_rate=0.02")
    assert not (folder / "out" / "checkpoint-1").exists()
    assert (folder / "out" / "notes.txt").exists()


def test_resume_goes_on(folder: Path) -> None:
    """A resumed run must end where the straight one ends, not begin again."""
    common = ["evaluation=null", "data.answer=teacher", "training.lr_scheduler_type=constant", "training.save_steps=1"]
    straight = run(*common, "training.max_steps=3", "training.output_dir=straight")
    run(*common, "training.max_steps=3")
    for path in (folder / "out").glob("checkpoint-3"):
        path.rename(folder / "gone")
    resume = [*common, "training.max_steps=3", "training.run_policy=resume"]
    with pytest.raises(CheckpointError, match="had 2 rows .* has 4 .*Change per_device_train_batch_size"):
        run(*resume, "training.gradient_accumulation_steps=2")
    split = ["training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=2"]
    resumed = run(*resume, *split, "training.eval_delay=1")
    ours, theirs = resumed.report["loss_history"][-1], straight.report["loss_history"][-1]
    assert ours["step"] == theirs["step"] == 3
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    again, words = run(*resume, words=(words := io.StringIO())), words.getvalue()
    assert again.record.metrics == resumed.record.metrics and again.record.metrics["train_loss"] > 0
    assert "no step is made" in words and again.record.status == "finished"


def test_only_the_first_process_looks_for_the_record(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On machines with disks of their own, it lies where the first process is, and the others' checkpoints without."""
    (folder / "out" / "checkpoint-2").mkdir(parents=True)
    resume = load_recipe("recipe.yaml", ["evaluation=null", "training.run_policy=resume"])
    with pytest.raises(OutputFolderError, match=r"no run.json"):
        build(resume)
    monkeypatch.setattr(DistillationConfig, "process_index", 1)
    assert build(resume).model is not None


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.train.path=missing.jsonl"], "missing.jsonl"),
        (["data.demonstrations.count=30", "evaluation.shots=0"], "too few"),
        (
            ["data.demonstrations={count: 30, path: other.jsonl}"],
            "other.jsonl has 20 rows; expected at least 30",
        ),
        (
            ["evaluation.path=verbs.jsonl", "evaluation.split=train", "evaluation.size=20"],
            "has the prompt of demonstration",
        ),
        (
            ["data.demonstrations.count=0", "data.student_shots=0", "evaluation.shots=0"],
            "no row of verbs.jsonl has a priv",
        ),
        (
            ["teacher.kind=ema", "data.demonstrations.count=0", "data.student_shots=0", "evaluation.shots=0"],
            "ema begins as the student and reads the same prompt, and no term learns the text: data.demonstrations.co",
        ),
        (
            ["data.answer=student", "data.generation.backend=vllm"],
            "data.generation.backend: This run wants vLLM to write, and it isn't installed",
        ),
        (["student.model=nothing/here"], "the tokenizer of student.model nothing/here can't be loaded"),
        (["data.prompt.builder='no.such:thing'"], "data.prompt.builder: no.such can't be imported"),
        (["data.prompt.builder='json:nothing'"], "data.prompt.builder: json has no nothing"),
        (["data.prompt.builder='json:__name__'"], "expected a function"),
        (["teacher={kind: 'json:JSONDecoder'}"], "expected a subclass of hfkd.teachers.Teacher"),
        (["loss.terms=[{kind: 'json:JSONDecoder'}]"], "expected a subclass of hfkd.losses.TokenLoss"),
        (["loss.terms=[{kind: 'no.such:Loss'}]"], "install it or put its folder on PYTHONPATH"),
        (["training.warmup_steps=-3"], "training: "),
        (["training.lr_scheduler_type=cosin"], "training: "),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], words: str
) -> None:
    """What can be known in a second must not be said after minutes of loading."""
    refuse_models(monkeypatch)
    with pytest.raises((ValueError, OSError)) as caught:
        run(*overrides)
    assert words in str(caught.value)


def test_a_copy_of_the_student_may_read_its_prompt(folder: Path) -> None:
    """Refusing a fixed copy beside a term that moves the student away would refuse the plainest regulariser."""
    loss = "loss.terms=[{kind: forward_kl}, {kind: cross_entropy}]"
    alone = ["data.demonstrations.count=0", "data.student_shots=0", "evaluation.shots=0", loss]
    for number, teacher in enumerate(("teacher.weights=frozen_copy", "teacher.kind=ema")):
        report = run(teacher, *alone, f"training.output_dir=out{number}").report
        assert [entry["step"] for entry in report["loss_history"]] == [1, 2]


@pytest.mark.parametrize(("name", "words"), [("c", "names the teacher 'c'"), (None, "is empty")])
def test_rows_without_a_teacher_are_told_before_a_model_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str | None, words: str
) -> None:
    """A name that is misspelt in one row of thousands, told after all teachers are loaded, in a column that the user's
    file doesn't have.
    """
    rows = [{"prompt": verb, "completion": verb + "ed", "who": "ab"[place % 2]} for place, verb in enumerate(VERBS)]
    Path("verbs.jsonl").write_text("".join(json.dumps(row | {"who": name}) + "\n" for row in rows[:1]))
    with Path("verbs.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows[1:])
    refuse_models(monkeypatch)
    members = "{a: {kind: local, model: model}, b: {kind: self}}"
    with pytest.raises(ValueError, match=rf"training row \d+: its column 'who' {words}.*known teachers are a, b"):
        run(
            f"teacher={{kind: routed, column: who, members: {members}}}",
            *("data.demonstrations.count=0", "data.student_shots=0", "evaluation=null"),
        )


def test_an_own_loss_without_a_teacher_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an own loss needs is known only when it is built; still before a model is loaded."""
    refuse_models(monkeypatch)
    with pytest.raises(RecipeError, match="asks for a teacher's distribution, and teacher.kind is none"):
        run("teacher.kind=none", "loss.terms=[{kind: 'hfkd.losses:ReverseKL'}]")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_model_is_named(folder: Path, file: str) -> None:
    """A download that broke off must not read as a bug of ours."""
    path = folder / "model" / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(OSError, match="student.model model can't be"):
        run()


def test_missing_weights_are_not_made_up(folder: Path) -> None:
    """transformers fills missing weights with random numbers and a warning; a student of that kind teaches nothing."""
    from safetensors.torch import load_file, save_file

    path = folder / "model" / "model.safetensors"
    weights = load_file(path)
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(OSError, match="lacks 1 of its weights, .*up_proj.weight among them"):
        run()


def test_a_teacher_with_other_tokens_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal ids that mean different tokens train the student to say nonsense, with a fine loss."""
    make_model().save_pretrained("teacher")
    tokenizer = make_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    tokenizer.save_pretrained("teacher")
    saved = json.loads(Path("teacher/tokenizer.json").read_text())
    saved["model"]["vocab"] = vocabulary
    Path("teacher/tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(VocabularyError, match="is 'A' for the student and 'B' for the teacher"):
        run("teacher={kind: local, model: teacher}")


def test_a_run_that_failed_in_training_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that says `started` for ever looks like a run that is still going."""

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr("hfkd.trainer.DistillationTrainer.train", broken)
    with pytest.raises(RuntimeError, match="out of luck"):
        run("evaluation=null")
    assert json.loads((folder / "out" / "run.json").read_text())["status"] == "failed"


def test_a_mended_recipe_may_use_the_folder(folder: Path) -> None:
    """A run that never began to train must not block its own repetition, and must fail before the teacher has
    written.
    """
    with pytest.raises(ValueError, match="max_length"):
        run("data.max_length=3", "evaluation=null", "data.answer=teacher")
    assert not (folder / "out").exists() or not list((folder / "out").iterdir())
    assert run("evaluation=null", "data.answer=teacher").record.status == "finished"


def test_rows_are_chosen_among_those_that_fit(folder: Path) -> None:
    """Chosen first and dropped afterwards, a run trains on the few rows of its choice that happen to be short."""
    rows = [{"prompt": verb * (1 if place % 4 == 0 else 60), "completion": "x"} for place, verb in enumerate(VERBS)]
    Path("mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fitting = sum(len(row["prompt"]) < 60 for row in rows)
    Path("shown.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    result = run(
        "data.train.path=mixed.jsonl",
        "data.demonstrations={path: shown.jsonl, count: 1}",
        "data.too_long=drop",
        "data.max_length=60",
        "evaluation=null",
        "training.max_steps=2",
    )
    assert result.record.data["training_examples"]["examples"] == fitting
    assert result.record.data["training_examples"]["too_long"] == len(rows) - fitting


def test_a_row_that_is_too_long_once_answered_is_counted(folder: Path) -> None:
    """Left out in silence, nobody would know how much the teacher's long answers cost."""
    words = io.StringIO()
    common = ["data.answer=teacher", "data.student_shots=[0]", "data.teacher_max_length=2048", "evaluation=null"]
    made = build(load_recipe("recipe.yaml", common))
    short = [made.builder.with_answer(row, "?") for row in made.train]
    limit = max(len(made.builder.encode_prompt(row)) + len(made.builder.encode_completion(row)) for row in short)
    more = ["data.too_long=drop", f"data.max_length={limit}", "data.generation.max_new_tokens=4"]
    counts = run(*common, *more, "training.max_steps=20", words=words).record.data["training_examples"]
    assert counts["too_long"] == 0 and counts["too_long_once_answered"] > 0
    assert "too long with the teacher's answer" in words.getvalue()


def test_a_resumed_run_needs_the_rows_that_it_began_with(folder: Path) -> None:
    """The recipe names a file; when what is in it has changed, the continuation is another run under the old one's
    name.
    """
    run("evaluation=null")
    changed = Path("verbs.jsonl").read_text().replace("ed", "ing")
    Path("verbs.jsonl").write_text(changed)
    with pytest.raises(ValueError, match="rows are not those that the run in out began with"):
        run("evaluation=null", "training.run_policy=resume")


def test_evaluation_items_are_not_trained_on(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A training row that asks an evaluation item in other letters makes the accuracy one on seen items."""
    asked = [{"prompt": f" {verb.upper()}", "completion": verb + "ed"} for verb in VERBS[:4]]
    Path("asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    shown = [{"prompt": f"verb{place}", "completion": f"verb{place}ed"} for place in range(4)]
    Path("shown.jsonl").write_text("".join(json.dumps(row) + "\n" for row in shown))
    overrides = ["evaluation.path=asked.jsonl", "evaluation.split=train", "data.demonstrations.path=shown.jsonl"]
    made = build(load_recipe("recipe.yaml", overrides))
    assert "are left out" in caplog.text
    assert not {row["prompt"] for row in made.train} & set(VERBS[:4])


def test_prompts_alone_are_enough_where_the_teacher_writes(folder: Path) -> None:
    """Self-distillation without labels must not ask for labels."""
    Path("asked.jsonl").write_text("".join(json.dumps({"prompt": verb}) + "\n" for verb in VERBS))
    shown = [{"prompt": f"verb{place}", "completion": f"verb{place}ed"} for place in range(4)]
    Path("shown.jsonl").write_text("".join(json.dumps(row) + "\n" for row in shown))
    overrides = ["data.train.path=asked.jsonl", "data.demonstrations.path=shown.jsonl", "evaluation=null"]
    assert run(*overrides, "data.answer=teacher").record.status == "finished"
    with pytest.raises(ValueError, match="completion"):
        run(*overrides, "data.answer=dataset", "training.output_dir=other")


def test_overwrite_leaves_no_other_weights(folder: Path) -> None:
    """A full model beside the new adapter would be loaded or uploaded in its place."""
    run("student.lora=null", "teacher.weights=frozen_copy", "evaluation=null")
    assert (folder / "out" / "model.safetensors").exists()
    run("evaluation=null", "training.run_policy=overwrite")
    assert not (folder / "out" / "model.safetensors").exists() and not (folder / "out" / "config.json").exists()
    assert (folder / "out" / "adapter_model.safetensors").exists()


def test_a_dry_build_needs_no_files(folder: Path) -> None:
    """Every recipe that ships is checked offline by this."""
    recipe = load_recipe(
        "recipe.yaml",
        [
            "student.model=org/nowhere",
            "data.train={path: openai/gsm8k, name: main, format: gsm8k}",
            "evaluation={path: openai/gsm8k, name: main, format: gsm8k, shots: [0, 4]}",
            "training.bf16=true",
        ],
    )
    made = build(recipe, dry=True)
    assert made.model is None and made.train == []
    assert made.sources["train"].path == "openai/gsm8k"
    assert made.objective.needs
    assert made.config.max_steps == 2


def test_evaluate_refuses_what_is_no_adapter(folder: Path) -> None:
    """Evaluating the bare model under an adapter's name would be a lie."""
    recipe = load_recipe("recipe.yaml")
    with pytest.raises(ValueError, match="has no adapter_config.json; expected the folder of a LoRA run"):
        evaluate_recipe(recipe, adapter=folder)
    with pytest.raises(ValueError, match="the recipe has no evaluation section"):
        evaluate_recipe(load_recipe("recipe.yaml", ["evaluation=null"]))


def test_a_push_is_tried_before_and_a_failure_keeps_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that is refused after a night of training has cost the night; a broken line at the end must not."""
    calls: list[tuple] = []

    def refused(*_: object, **__: object) -> None:
        raise OSError("the hub refuses this token")

    monkeypatch.setattr(hfkd.run.conduct, "check_push", refused)
    with pytest.raises(OSError, match="refuses this token"):
        run("hub={push: true, repo_id: me/it, base: me/base}", "evaluation=null")
    assert not Path("out/run.json").exists(), "nothing was trained"
    monkeypatch.setattr(hfkd.run.conduct, "check_push", lambda *given, **settings: calls.append((given, settings)))
    monkeypatch.setattr(hfkd.run.outcome, "push", refused)
    words = io.StringIO()
    with pytest.raises(OSError, match="refuses this token"):
        run("hub={push: true, repo_id: me/it, base: me/base}", "evaluation=null", words=words)
    assert calls == [(("me/it",), {"private": True, "with_base": False})]
    assert json.loads(Path("out/run.json").read_text())["status"] == "finished"
    assert "hfkd push out me/it --base me/base" in words.getvalue()


@pytest.mark.parametrize("members", [False, True])
def test_an_own_local_teacher_has_its_own_tokenizer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, members: bool
) -> None:
    """A class of the user's own says itself what it loads; there is no `teacher.model` to read a tokenizer from."""
    make_model(seed=1).save_pretrained("theirs")
    make_tokenizer().save_pretrained("theirs")
    code = "from hfkd import LocalTeacher\nclass Mine(LocalTeacher):\n"
    code += "    def __init__(self, folder): super().__init__(folder)\n"
    Path("own_local.py").write_text(code)
    monkeypatch.syspath_prepend(str(folder))
    mine = "{kind: 'own_local:Mine', options: {folder: %s}}"
    named = f"{{kind: mixture, members: {{a: {mine}, b: {{kind: local, model: theirs}}}}}}" if members else mine
    assert run(f"teacher={named % 'theirs'}", "evaluation=null").record.status == "finished"
    if not members:
        saved = json.loads(Path("theirs/tokenizer.json").read_text())
        ids = saved["model"]["vocab"]
        ids["A"], ids["B"] = ids["B"], ids["A"]
        Path("theirs/tokenizer.json").write_text(json.dumps(saved))
        with pytest.raises(VocabularyError, match="is 'A' for the student and 'B' for the teacher"):
            run(f"teacher={named % 'theirs'}", "evaluation=null", "training.run_policy=overwrite")


def test_a_figure_that_is_no_number_loses_no_report(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An overflow of float16's scaler is logged as inf, for which JSON has no word: all that was measured was lost."""
    train = hfkd.trainer.DistillationTrainer.train

    def with_overflow(self, *args: object, **kwargs: object) -> object:
        outcome = train(self, *args, **kwargs)
        self.state.log_history[0]["grad_norm"] = float("inf")
        return outcome

    monkeypatch.setattr(hfkd.trainer.DistillationTrainer, "train", with_overflow)
    report = run().report
    assert report["loss_history"][0]["grad_norm"] is None
    assert json.loads(Path("out/report.json").read_text()) == report


def test_what_fails_after_training_keeps_the_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation that runs out of memory must not cost what was trained, nor look like a run that ended well."""
    measure, calls = hfkd.run.conduct.measure_fidelity, []

    def dies(*args: object) -> object:
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return measure(*args)

    monkeypatch.setattr(hfkd.run.conduct, "measure_fidelity", dies)
    with pytest.raises(RuntimeError, match="out of memory"):
        run("training.save_strategy=no")
    assert Path("out/adapter_model.safetensors").is_file() and Path("out/tokenizer.json").is_file()
    assert json.loads(Path("out/run.json").read_text())["status"] == "failed"


def test_a_report_that_cannot_be_written_is_no_finished_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk while the pictures are drawn: whoever starts it again must see that it isn't whole."""

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(hfkd.run.outcome, "draw_plots", full)
    with pytest.raises(OSError, match="No space"):
        run()
    assert json.loads(Path("out/run.json").read_text())["status"] == "failed"


def test_time_and_energy_are_those_of_all_sessions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was continued is told as one that took the time of its last session."""
    used = {"joules": 10.0, "devices": ["cpu package 0"], "source": "rapl", "seconds": 2.0}
    monkeypatch.setattr(hfkd.run.conduct.EnergyMeter, "to_dict", lambda self: used)
    keeping = ["training.save_strategy=steps", "training.save_steps=1"]
    first = run(*keeping).record
    again = run(*keeping, "training.run_policy=resume").record
    assert (first.sessions, again.sessions) == (1, 2)
    assert all(again.durations[stage] >= spent for stage, spent in first.durations.items())
    assert again.energy == {**used, "joules": 20.0, "seconds": 4.0}


def test_what_training_changed_is_told_item_by_item(folder: Path) -> None:
    """Two accuracies with intervals that overlap say less than the same items asked twice."""
    report = run("evaluation.gold_baseline=true").report
    wanted = ("before", "after", "2")
    one = next(each for each in report["differences"] if (each["from"], each["to"], each["shots"]) == wanted)
    before, after = (report["k_shot"][stage]["2"] for stage in ("before", "after"))
    assert one["difference"] == pytest.approx(after - before) and one["items"] == 4
    assert one["interval"][0] <= one["difference"] <= one["interval"][1]
    assert {(each["from"], each["to"]) for each in report["differences"]} == {("before", "after"), ("gold", "after")}


def test_a_cached_teacher_says_where_its_fidelity_is_to_be_had(folder: Path) -> None:
    """`Build a cache`, told to someone who has just built one, sends him in a circle."""
    from hfkd.cache import make_codec
    from hfkd.run.caching import build_cache

    quiet = Console(file=io.StringIO())
    build_cache(load_recipe("recipe.yaml"), Path("cache"), make_codec("topk", k=8), console=quiet)
    reason = run("teacher.cache=cache").report["fidelity"]["unavailable"]
    assert "hfkd evaluate out --fidelity teacher.cache=null" in reason


def test_before_and_after_are_asked_in_one_precision(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under bf16 the trained student kept its autocast: half of what training changed was the rounding."""
    asked, seen = hfkd.run.conduct.ask, []

    def watched(run, model, task, description):
        hook = model.lm_head.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
        try:
            return asked(run, model, task, description)
        finally:
            hook.remove()

    monkeypatch.setattr(hfkd.run.conduct, "ask", watched)
    run("student.lora=null", "teacher={kind: local, model: model}", "training.bf16=true", "evaluation.fidelity=false")
    assert seen and not any(seen)


def test_tasks_of_one_name_are_told_apart(folder: Path) -> None:
    """Two files of one name in different folders, and one of the two results is lost."""
    for name in ("one", "two"):
        Path(name).mkdir()
        shutil.copy("other.jsonl", f"{name}/test.jsonl")
    forgetting = (
        "[" + ", ".join(f"{{path: {name}/test.jsonl, size: 3, demonstrations: 2}}" for name in ("one", "two")) + "]"
    )
    report = run(f"evaluation.forgetting={forgetting}").report
    assert [one["task"] for one in report["forgetting"]] == ["test", "test (2)"]


def test_the_baseline_is_not_evaluated_before_its_first_step(folder: Path) -> None:
    """With `eval_on_start` the fine-tuning on gold, which has nothing to evaluate on, ended a run that was trained."""
    watched = ["training.eval_strategy=steps", "training.eval_steps=1", "training.eval_on_start=true"]
    report = run(*watched, "evaluation.gold_baseline=true").report
    assert report["k_shot"].keys() == {"before", "after", "gold"}
    assert {entry["step"] for entry in report["evaluation_history"]} == {0, 1, 2}
