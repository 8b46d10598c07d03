"""`hfkd check` on whole recipes of a tiny model: what it finds before training, and that it leaves nothing behind."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_model, make_tokenizer
from rich.console import Console
from typer import Typer
from typer.testing import CliRunner

import hfkd.preflight.memory
from hfkd.cli.check import check
from hfkd.data.prompts import PromptBuilder
from hfkd.preflight import Finding, check_recipe, exit_code
from hfkd.recipe import load_recipe
from hfkd.rollout.base import GenerationSettings
from hfkd.rollout.hf import HFRollout
from hfkd.run import run_recipe
from hfkd.run.build import settings_of
from hfkd.run.rows import load_data

VERBS = ["walk", "talk", "jump", "look", "call", "ask", "work", "play", "help", "turn", "move", "live", "love", "use",
         "open", "close", "wash", "push", "pull", "cook"]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with two models, rows and a recipe."""
    monkeypatch.chdir(tmp_path)
    for name, seed in (("model", 0), ("other", 1)):
        make_model(seed=seed).save_pretrained(name)
        make_tokenizer().save_pretrained(name)
    write_rows("verbs.jsonl", [{"prompt": verb, "completion": verb + "ed"} for verb in VERBS])
    recipe = {
        "student": {"model": "model", "lora": {"r": 2, "alpha": 4}},
        "teacher": {"kind": "self"},
        "data": {
            "train": {"path": "verbs.jsonl"},
            "demonstrations": {"count": 4},
            "student_shots": [0, 1],
            "generation": {"max_new_tokens": 4},
        },
        "evaluation": {"shots": [0, 2], "size": 6, "max_new_tokens": 12},
        "training": {
            "output_dir": "out",
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "use_cpu": True,
        },
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


@pytest.fixture
def texts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs a model, and takes most of the time, is left out."""
    for stage in ("_memory", "_load_models", "_trials"):
        monkeypatch.setattr(f"hfkd.preflight.check._Preflight.{stage}", lambda _: None)


def write_rows(name: str, rows: Sequence[dict]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def examine(*overrides: str, words: io.StringIO | None = None, **options) -> list[Finding]:
    console = Console(file=words or io.StringIO(), width=160)
    return check_recipe(load_recipe("recipe.yaml", overrides), items=6, console=console, **options)


def of(findings: Sequence[Finding], name: str, level: str | None = None) -> list[Finding]:
    return [one for one in findings if one.name == name and level in (None, one.level)]


def errors(findings: Sequence[Finding]) -> set[str]:
    return {one.name for one in findings if one.level == "error"}


def only(findings: Sequence[Finding], name: str) -> Finding:
    (found,) = of(findings, name)
    return found


def test_a_sound_recipe(folder: Path) -> None:
    """A check that writes, or changes what it looks at, is one that nobody dares to run."""
    before = sorted(str(path) for path in folder.rglob("*"))
    words = io.StringIO()
    found = examine("data.answer=teacher", "training.save_steps=1", words=words)
    assert sorted(str(path) for path in folder.rglob("*")) == before
    names = {one.name for one in found}
    assert names >= {"output folder", "rows", "vocabulary", "template", "examples", "leakage", "memory"}
    assert names >= {"anything to distil", "answer lengths", "loss by two paths", "duration"}
    assert errors(found) <= {"anything to distil"}  # the models are random
    text = words.getvalue()
    assert text.index("The first examples") < text.index("Findings")
    assert all(kind in text for kind in ("both read", "run once", "learned", "what the teacher will write"))
    assert text.rstrip().splitlines()[-1].split(",")[0] in ("passed", "1 error", "1 warning", "2 warnings")
    paths = only(found, "loss by two paths")
    assert paths.figures["compared"] and paths.figures["trainer"] > 0 and paths.figures["relative_difference"] < 1e-4
    assert 0 <= paths.figures["gradient_difference"] < 1e-3
    time = only(found, "duration").figures
    assert time["steps"] == 6 and time["micro_steps"] == 2
    assert time["parts"]["training"] == pytest.approx(12 * sorted(time["seconds_each"])[1], rel=1e-6)
    assert time["questions"] == 6 * 2 * 2 and time["parts"]["teacher's answers"] > 0


CACHED = ["teacher.cache=cache", "data.answer=dataset"]
CACHED_ANSWERS = ["teacher.cache=cache", "data.answer=teacher"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["teacher={kind: none}", "loss.terms=[{kind: cross_entropy}]"],
        ["teacher={kind: local, model: other}", "data.demonstrations.count=0", "data.student_shots=[0]",
         "evaluation.shots=[0]", "student.lora=null"],
        ["teacher.weights=frozen_copy", "student.lora=null", "loss.terms=[{kind: sinkhorn, support: 8}, forward_kl]"],
        ["teacher={kind: mixture, members: {a: {kind: local, model: other, weight: 3}, b: {kind: self}}}"],
        ["teacher={kind: ema}", "loss.terms=[{kind: jensen_shannon, mixture_weight: 0.3, temperature: 2.0}]"],
        ["data.answer={student: 1.0, dataset: 1.0}", "loss.terms=[{kind: reverse_kl}, {kind: cross_entropy}]"],
        ["evaluation=null", "training.max_steps=-1", "training.num_train_epochs=2"],
        CACHED,
        CACHED_ANSWERS,
        ["training.bf16=true", "training.eval_strategy=steps", "training.eval_on_start=true", "teacher.weights=live"],
    ],
    ids=lambda overrides: " ".join(overrides)[:60],
)  # fmt: skip
def test_kinds_of_recipes(folder: Path, overrides: list[str]) -> None:
    """A check that breaks on a kind of teacher is skipped for exactly the recipes that nobody has tried before."""
    overrides = [one.replace("forward_kl]", "{kind: forward_kl}]") for one in overrides]
    cached = overrides in (CACHED, CACHED_ANSWERS)
    if cached:
        make_cache(overrides[1])
    found = examine(*overrides)
    assert errors(found) <= {"anything to distil"}, [one for one in found if one.level == "error"]
    assert not of(found, "not run")
    compared = only(found, "loss by two paths")
    assert compared.figures["compared"] == (not cached and "sinkhorn" not in str(overrides))
    assert compared.figures["compared"] or "Not compared: the t" in compared.message
    assert only(found, "duration").figures["seconds"] > 0
    (asked,) = of(found, "anything to distil")[:1]
    if "none" in overrides[0]:
        assert "no teacher is asked" in asked.message
    elif cached:
        assert "read from a cache" in asked.message and asked.figures["tokens"] > 0
    elif "mixture" in overrides[0]:
        assert [one.message.split(":")[0] for one in of(found, "anything to distil")] == ["a", "b"]
    else:
        assert asked.figures["items"] == 6
    time = only(found, "duration")
    teachers = 6 if "local" in overrides[0] and "mixture" not in overrides[0] else 0
    assert time.figures["teacher_questions"] == teachers
    assert ("teacher's evaluation" in time.figures["parts"]) == bool(teachers)
    asks_more = "evaluation=null" not in overrides and "evaluation.shots=[0]" not in overrides
    assert ("with 2 it takes longer" in time.message) == asks_more


def make_cache(*overrides: str) -> None:
    from hfkd.cache import make_codec
    from hfkd.run.caching import build_cache

    build_cache(
        load_recipe("recipe.yaml", overrides), "cache", make_codec("topk", k=8), console=Console(file=io.StringIO())
    )


@pytest.mark.parametrize("kind", ["nothing of the assistant", "no template"])
def test_a_template_without_an_assistant_token(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose labels are all -100 trains for hours and changes nothing."""
    tokenizer = make_tokenizer()
    template = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
    tokenizer.chat_template = template if kind == "nothing of the assistant" else None
    Path("model/chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained("model")
    refuse_models(monkeypatch)
    found = examine("data.prompt={style: chat, stop: []}")
    assert errors(found) == {"template"}
    words = of(found, "template", "error")[0].message
    assert ("leaves no assistant token" if kind == "nothing of the assistant" else "has no chat template") in words
    assert exit_code(found) == 1
    assert of(found, "leakage", "pass"), "a check that needs no template wasn't run"


def refuse_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("hfkd.preflight.check.load_student", loaded)


def test_a_template_without_an_end(folder: Path, texts_alone: None) -> None:
    """A student that was never taught to stop writes until the limit, in every evaluation."""
    found = examine("data.prompt.answer=' {completion}'", "data.prompt.separator='\\n'")
    assert "isn't taught to stop" in of(found, "template", "warning")[0].message


def test_stop_strings_within_answers(folder: Path, texts_alone: None) -> None:
    """Answers of several lines with a line end as stop string: each generated one ends after its first line."""
    write_rows("verbs.jsonl", [{"prompt": verb, "completion": f"{verb}ed\nyes"} for verb in VERBS])
    found = examine()
    assert of(found, "template", "warning")[0].figures["holding_a_stop_string"] == 20 - 4 - 6


def test_another_vocabulary(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher whose ids mean other tokens teaches noise, and its loss falls all the same."""
    make_tokenizer(vocab_size=300).save_pretrained("other")
    vocab = json.loads(Path("other/tokenizer.json").read_text())
    table = vocab["model"]["vocab"]
    first, second = list(table)[10:12]
    table[first], table[second] = table[second], table[first]
    Path("other/tokenizer.json").write_text(json.dumps(vocab))
    refuse_models(monkeypatch)
    found = examine("teacher={kind: local, model: other}")
    assert errors(found) == {"vocabulary"}
    (finding,) = of(found, "vocabulary", "error")
    assert finding.figures["ids_that_differ"] >= 2 and "don't share a vocabulary" in finding.message


def test_a_tokenizer_larger_than_its_model(folder: Path, texts_alone: None) -> None:
    """Ids without an embedding end in an index error somewhere on a GPU."""
    make_model(vocab_size=260).save_pretrained("model")
    found = examine()
    assert "writes 379 ids, but the model reads and scores 260 only" in of(found, "vocabulary", "error")[0].message
    make_model().save_pretrained("model")
    make_model(vocab_size=260).save_pretrained("other")
    found = examine("teacher={kind: local, model: other}")
    assert "can read the first 260 only" in of(found, "vocabulary", "error")[0].message


def test_leaked_demonstrations(folder: Path, texts_alone: None) -> None:
    """Demonstrations that are asked or learned: the answer stands in the prompt, and accuracy measures copying."""
    write_rows("shown.jsonl", [{"prompt": verb, "completion": verb + "ed"} for verb in VERBS[:4]])
    write_rows("asked.jsonl", [{"prompt": verb.upper() + "!", "completion": verb + "ed"} for verb in VERBS[2:8]])
    found = examine("data.demonstrations={count: 4, path: shown.jsonl}", "evaluation.path=asked.jsonl")
    leaks = of(found, "leakage")
    kinds = {(one.figures["part"], one.figures["other"]): (one.level, one.figures["count"]) for one in leaks}
    assert kinds[("demonstrations", "evaluation items")] == ("error", 2)
    assert kinds[("evaluation items", "training rows")] == ("error", 6)
    assert kinds[("demonstrations", "training rows")] == ("warning", 4)
    assert "4 training rows of the same prompt are left out" in leaks[-1].message
    assert of(found, "examples")[0].figures["demonstrations_left_out"] == 4
    write_rows("asked.jsonl", [{"prompt": verb, "completion": verb + "ed"} for verb in VERBS[2:8]])
    found = examine("data.demonstrations={count: 4, path: shown.jsonl}", "evaluation.path=asked.jsonl")
    assert errors(found) == {"rows"} and "has the prompt of demonstration" in of(found, "rows", "error")[0].message
    assert of(found, "vocabulary", "pass"), "a check that needs no rows wasn't run"
    assert "leakage" not in {one.name for one in found}


def test_own_demonstrations_that_are_asked(folder: Path, texts_alone: None) -> None:
    """A row's own demonstrations may hold what is asked later: the student then learns the held-out answers."""
    shown = [{"prompt": "walk", "completion": "walked"}, {"prompt": "new", "completion": "newed"}]
    write_rows("verbs.jsonl", [{"prompt": v, "completion": v + "ed", "demonstrations": shown} for v in VERBS[6:]])
    write_rows("asked.jsonl", [{"prompt": verb, "completion": verb + "ed"} for verb in VERBS[:6]])
    found = examine("data.demonstrations={count: 1, column: demonstrations}", "evaluation.path=asked.jsonl",
                    "evaluation.shots=[0]")  # fmt: skip
    (leak,) = of(found, "leakage", "error")
    assert leak.figures["part"] == "rows' own demonstrations" and leak.figures["pairs"] == [[0, 0, 1.0]]


def test_a_teacher_worse_than_its_student(folder: Path) -> None:
    """Distilling from a weaker teacher takes away what the student knows; the loss doesn't tell."""
    tokenizer, model = make_tokenizer(), make_model(seed=0)
    settings = GenerationSettings(max_new_tokens=12, stop=("\n",))
    prompts = [tokenizer(f"Question: {verb}\nAnswer:")["input_ids"] for verb in VERBS]
    texts = [one.text.strip().splitlines() for one in HFRollout(tokenizer, settings).generate(model, prompts)]
    rows = [{"prompt": v, "completion": t[0].strip()} for v, t in zip(VERBS, texts, strict=True) if t and t[0].strip()]
    write_rows("verbs.jsonl", rows)
    common = ["data.demonstrations.count=0", "data.student_shots=[0]", "evaluation.shots=[0]", "student.lora=null"]
    found = examine("teacher={kind: local, model: other}", *common)
    (finding,) = of(found, "anything to distil")
    assert finding.level == "error" and "worse than its student" in finding.message
    assert finding.figures["student"]["accuracy"] > finding.figures["teacher"]["accuracy"] + 0.5
    assert finding.figures["over_student"]["mean"] < 0 < finding.figures["student"]["standard_error"] + 1e-9
    turned = examine("student.model=other", "teacher={kind: local, model: model}", *common)
    assert of(turned, "anything to distil")[0].level == "pass"


def test_a_chunk_that_does_not_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory in the first step is the commonest end of a run, and one number would have avoided it."""
    write_rows("verbs.jsonl", [{"prompt": verb, "completion": (verb + "ed ") * 24} for verb in VERBS])
    common = ["teacher={kind: none}", "loss.terms=[{kind: cross_entropy}]", "evaluation=null"]
    totals = {size: measure(*common, f"loss.chunk_size={size}") for size in (64, 1024)}
    assert totals[64] < totals[1024]
    refuse_models(monkeypatch)
    monkeypatch.setattr(hfkd.preflight.memory, "available_bytes", lambda *_: totals[64] + 1)
    found = examine(*common, "loss.chunk_size=1024")
    (finding,) = of(found, "memory")
    assert finding.level == "error" and errors(found) == {"memory"} and exit_code(found) == 1
    chunk = finding.figures["chunk_size_that_fits"]
    assert f"loss.chunk_size is 1024; with loss.chunk_size={chunk} it fits" in finding.message and chunk >= 64
    assert only(found, "not run").figures["duration"] == ["trainer"]
    monkeypatch.setattr(hfkd.preflight.memory, "available_bytes", lambda *_: 1000)
    found = examine(*common)
    words = only(found, "memory").message
    assert "whatever loss.chunk_size is" in words and "per_device_train_batch_size" in words
    assert "gradient_checkpointing" in words


def measure(*overrides: str) -> int:
    run = settings_of(load_recipe("recipe.yaml", overrides))
    run.take(load_data(run.recipe, run.sources))
    run.tokenizer = make_tokenizer()
    run.builder = PromptBuilder(run.tokenizer, run.style)
    return hfkd.preflight.memory.estimate(run).total


def test_several_processes(folder: Path) -> None:
    """What one process takes says little of a run of eight; nor does its time."""
    words = io.StringIO()
    common = ["training.max_steps=-1", "training.num_train_epochs=4", "data.demonstrations.count=2",
              "training.gradient_accumulation_steps=1", "evaluation.gold_baseline=true"]  # fmt: skip
    one, two = examine(*common), examine(*common, processes=2, words=words)
    assert "each of 2" in words.getvalue() and "one process" in words.getvalue()
    assert only(two, "memory").figures["processes"] == 2
    assert only(one, "duration").figures["steps"] == 2 * only(two, "duration").figures["steps"] == 24


def test_an_output_folder_that_is_a_file(folder: Path, texts_alone: None) -> None:
    """No command line makes a folder of a file: the run would be refused after a check that passed."""
    Path("afile").write_text("x")
    found = examine("training.output_dir=afile")
    assert errors(found) == {"output folder"} and "is a file" in only(found, "output folder").message
    assert only(examine("training.output_dir=new"), "output folder").level == "pass"


@pytest.mark.parametrize("policy", ["refuse", "resume"])
def test_a_used_folder(folder: Path, policy: str) -> None:
    """Whoever checks a recipe a second time must not be stopped by the run that it made, only told of it."""
    run_recipe(load_recipe("recipe.yaml", ["evaluation=null"]), console=Console(file=io.StringIO()))
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")}
    found = examine(f"training.run_policy={policy}")
    finding = only(found, "output folder")
    assert finding.level == ("warning" if policy == "refuse" else "error")
    assert "another run" in finding.message or "another recipe" in finding.message
    assert of(found, "duration", "pass")
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")} == before


def test_rows_that_are_left_out(folder: Path, texts_alone: None) -> None:
    """Half of the data dropped for a limit that nobody looked at is the kind of fault that a table must show."""
    long = [{"prompt": verb + " " + "very " * 40, "completion": verb + "ed"} for verb in VERBS[:4]]
    write_rows("verbs.jsonl", [*({"prompt": v, "completion": v + "ed"} for v in VERBS), *long])
    found = examine("data.max_length=60", "data.too_long=drop", "evaluation=null", "data.student_shots=[0]",
                    "data.teacher_max_length=2000")  # fmt: skip
    (dropped,) = of(found, "examples", "warning")
    assert dropped.figures["too_long"] == of(found, "examples")[0].figures["too_long"] > 0
    assert "Raise the limits" in dropped.message
    found = examine("data.max_length=20", "evaluation=null")
    assert errors(found) == {"examples"} and "raise data.max_length" in only(found, "examples").message


def test_views_beyond_the_models_positions(folder: Path) -> None:
    """A model that is read beyond its positions says something; it only makes no sense."""
    make_model(max_position_embeddings=16).save_pretrained("model")
    found = of(examine("evaluation=null"), "examples", "error")
    assert "was made for 16 positions" in found[0].message and len(found) == 2


def test_answers_that_are_cut(folder: Path) -> None:
    """A student that learns answers without their end learns never to stop."""
    found = examine("data.answer=teacher", "data.generation.max_new_tokens=1", "data.prompt.stop=['zzz']")
    (lengths,) = of(found, "answer lengths", "warning")
    assert lengths.figures["cut_share"] > 0.5 and "Raise data.generation.max_new_tokens" in lengths.message


def test_gold_answers_that_no_reply_can_hold(folder: Path, texts_alone: None) -> None:
    """An evaluation whose limit is below the gold answers' length scores zero, whatever was learned."""
    (lengths,) = of(examine("evaluation.max_new_tokens=1"), "answer lengths")
    assert lengths.level == "warning" and lengths.figures["longer_share"] == 1.0
    assert lengths.figures["min"] <= lengths.figures["median"] <= lengths.figures["p95"] <= lengths.figures["max"]


def test_a_loss_that_is_no_number(folder: Path) -> None:
    """A broken weight is found in minutes, not at the first log line of a night."""
    model = make_model()
    model.model.norm.weight.data[0] = float("nan")
    model.save_pretrained("model")
    found = examine("evaluation=null")
    assert "loss by two paths" in errors(found) and exit_code(found) == 1


def test_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler reads the exit code, a dashboard the JSON, and neither may hold a path or a secret."""
    app, runner = Typer(), CliRunner()
    app.command()(check)
    common = ["recipe.yaml", "teacher={kind: none}", "loss.terms=[{kind: cross_entropy}]", "--items", "2"]
    with monkeypatch.context() as patched:
        patched.setattr("hfkd.preflight.check.check_recipe", None)
        for place in ("recipe.yaml/found.json", "model"):
            early = runner.invoke(app, [*common, "--json", place])
            assert early.exit_code == 2 and "--json" in early.output
    good = runner.invoke(app, [*common, "--json", "found.json"])
    assert good.exit_code == 0, good.output
    told = json.loads(Path("found.json").read_text())
    assert told["recipe"] == "recipe.yaml" and str(folder) not in json.dumps(told)
    assert told["verdict"] in ("passed", "1 warning")
    assert {one["level"] for one in told["findings"]} <= {"pass", "warning"}
    monkeypatch.setattr("hfkd.preflight.check._Preflight._trials", lambda _: None)
    Path("out").mkdir()
    Path("out/run.json").write_text("{}")
    assert runner.invoke(app, common).exit_code == 0
    assert runner.invoke(app, [*common, "--strict"]).exit_code == 1
    bad = runner.invoke(app, ["recipe.yaml", "data.train.path=nowhere.jsonl"])
    assert bad.exit_code == 1 and "nowhere.jsonl" in bad.output
    assert runner.invoke(app, ["recipe.yaml", "studnet.model=x"]).exit_code == 2


def test_the_weights_stay(folder: Path) -> None:
    """A check that wrote the weights of its trial steps would change the run that it is to foretell."""
    before = Path("model/model.safetensors").read_bytes()
    examine("evaluation=null")
    assert Path("model/model.safetensors").read_bytes() == before
    assert torch.is_grad_enabled()
