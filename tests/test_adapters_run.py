"""Several adapters from one recipe on a tiny model: trained one by one, loaded together, asked until they agree."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_model, make_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from hfkd.adapters import Reasoners, adapter_names, load_adapters, using
from hfkd.cache import CacheError, make_codec
from hfkd.cli.reason import question_lines, summary_lines
from hfkd.data.prompts import PromptStyle
from hfkd.errors import CheckpointNotSaved, NonFiniteLoss
from hfkd.recipe import expand, load_recipe
from hfkd.record import OutputFolderError
from hfkd.rollout.base import GenerationSettings
from hfkd.run import run_recipe
from hfkd.run.adapters import run_adapters
from hfkd.run.caching import build_cache
from hfkd.run.reasoning import Asking, find_adapters, reason

NAMES = ("intuitive", "knowledge", "deep")
TOKENS = torch.arange(5, 17)[None]
ROWS = [
    {"question": f"{a} and {b}?", "rationale": f"It is {a + b}.", "knowledge": ["Add both."], "answer": str(a + b)}
    for a in range(1, 5)
    for b in range(1, 5)
]


def saved_adapter(folder: Path, seed: int, rank: int = 4) -> Path:
    torch.manual_seed(seed)
    lora = LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(make_model(), lora).save_pretrained(folder)
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.fixture
def three(tmp_path: Path) -> dict[str, Path]:
    """Three adapters of different ranks."""
    return {name: saved_adapter(tmp_path / name, seed, 2 + seed) for seed, name in enumerate(NAMES)}


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model, rows and a recipe of three adapters of a second's length."""
    monkeypatch.chdir(tmp_path)
    lay_out()
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Such a folder in which the recipe was run, and what it printed; only to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    with contextlib.chdir(folder):
        lay_out()
        return folder, train()[1]


@pytest.fixture
def trained(finished: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A copy of it to work in; gives what was printed."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return finished[1]


def lay_out() -> None:
    make_model().save_pretrained("model")
    make_tokenizer().save_pretrained("model")
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    own = {name: {"data": {"train": {"format": f"hfkd.adapters.rows:{name}"}}} for name in NAMES}
    own["knowledge"]["data"]["prompt"] = {"question": "Rules for {prompt}:"}
    own["deep"]["training"] = {"learning_rate": 0.02}
    recipe = {
        "student": {"model": "model", "lora": {"r": 2, "alpha": 4}},
        "teacher": {"kind": "none"},
        "data": {"train": {"path": "rows.jsonl"}},
        "loss": {"terms": [{"kind": "cross_entropy"}]},
        "training": {
            "output_dir": "out",
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "use_cpu": True,
            "learning_rate": 0.01,
            "disable_tqdm": True,
            "report_to": "none",
        },
        "adapters": own,
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))


def train(*overrides: str) -> tuple[dict, str]:
    screen = io.StringIO()
    done = run_recipe(load_recipe("recipe.yaml", overrides), console=Console(file=screen, width=200))
    return done.runs, screen.getvalue()


def test_each_named_adapter_is_itself(three):
    """Adapters that share a base must not share a weight: each must say, bit for bit, what it says alone."""
    model = load_adapters(make_model(), three)
    assert adapter_names(model) == list(NAMES)
    found = {}
    for name, folder in three.items():
        with using(model, name):
            found[name] = logits(model)
        assert torch.equal(found[name], logits(PeftModel.from_pretrained(make_model(), folder).eval())), name
    assert not torch.equal(found["intuitive"], found["deep"]), "this test would pass on three copies of one adapter"
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(make_model())), "the base was changed"


def test_the_adapter_before_comes_back(three):
    """After an error too: else the next question goes to the wrong adapter, in silence."""
    model = load_adapters(make_model(), three)
    with pytest.raises(RuntimeError, match="inside"), using(model, "deep"):
        assert model.active_adapter == "deep"
        raise RuntimeError("inside")
    assert model.active_adapter == "intuitive"
    assert not any(parameter.requires_grad for parameter in model.parameters()), "asking must not make it learn"


def test_an_adapter_that_is_not_there(three):
    """A misspelt name must be met with those that there are."""
    model = load_adapters(make_model(), three)
    with (
        pytest.raises(ValueError, match="no adapter 'depp' .known: intuitive, knowledge, deep."),
        using(model, "depp"),
    ):
        pass
    reasoners = Reasoners(model, make_tokenizer(), {}, GenerationSettings(max_new_tokens=2, temperature=1.0))
    with pytest.raises(ValueError, match="deep: there is no adapter 'depp'"):
        reasoners.agree(["q"], deep="depp")
    with pytest.raises(ValueError, match="styles: there is no adapter 'depp'"):
        Reasoners(model, make_tokenizer(), {"depp": PromptStyle()}, GenerationSettings())


def test_adapters_that_can_not_be_loaded(three, tmp_path):
    """A damaged, absent or pickled file, or an adapter of another model, must be named."""
    with pytest.raises(ValueError, match="got no adapter to load"):
        load_adapters(make_model(), {})
    (three["deep"] / "adapter_model.safetensors").rename(three["deep"] / "adapter_model.bin")
    with pytest.raises(OSError, match="the adapter 'deep' in .* has no adapter_model.safetensors"):
        load_adapters(make_model(), three)
    (three["deep"] / "adapter_model.safetensors").write_bytes(b"12345678{}")
    with pytest.raises(OSError, match="the adapter 'deep' in .* can't be"):
        load_adapters(make_model(), three)
    del three["deep"]
    with pytest.raises(OSError, match="the adapter 'intuitive' in .* can't be"):
        load_adapters(make_model(hidden_size=64), three)


def test_a_question_has_its_own_draws(three):
    """The outcome of a question must not hang on which others are asked with it, or a file can't be asked in parts."""
    settings = GenerationSettings(max_new_tokens=6, temperature=1.0, batch_size=2)
    reasoners = Reasoners(load_adapters(make_model(), three), make_tokenizer(), {}, settings)
    options = {"max_rounds": 3, "extract": lambda text: text or None}
    together = reasoners.agree(["one?", "two?", "three?"], **options)
    assert reasoners.agree(["two?"], **options) == [together[1]]
    first, second = together[0].rounds[:2]
    assert first.intuitive != second.intuitive, "a round that repeats the one before is wasted"
    assert first.intuitive != first.knowledge
    assert 0 < reasoners.cut <= reasoners.written, "six tokens of noise end in no stop string"
    with pytest.raises(ValueError, match="temperature is 0 and max_rounds is 3"):
        Reasoners(reasoners.model, make_tokenizer(), {}, GenerationSettings()).agree(["q"], max_rounds=3)


def test_each_adapter_has_draws_of_its_own(tmp_path):
    """Two adapters that share their luck agree more often than two ways to an answer do."""
    folders = {name: saved_adapter(tmp_path / name, seed=0) for name in ("one", "other")}
    settings = GenerationSettings(max_new_tokens=6, temperature=1.0)
    reasoners = Reasoners(load_adapters(make_model(), folders), make_tokenizer(), {}, settings)
    texts = {name: reasoners.write(name, ["two?"]) for name in folders}
    assert texts["one"] != texts["other"], "equal weights, equal prompt, equal round: the name makes the difference"
    assert texts["one"] == reasoners.write("one", ["two?"])


def test_one_recipe_trains_what_three_would(trained):
    """Runs in one process must not touch each other: each adapter equals, bit for bit, that of a run by itself."""
    assert "Adapter knowledge (2 of 3)" in trained and 'hfkd reason out "your question"' in trained
    for name in NAMES:
        tree = yaml.safe_load(Path("recipe.yaml").read_text())
        own = tree.pop("adapters")[name]
        tree["data"]["train"] |= own["data"]["train"]
        tree["data"]["prompt"] = own["data"].get("prompt", {})
        tree["training"] |= own.get("training", {}) | {"output_dir": f"alone/{name}"}
        Path("alone.yaml").write_text(yaml.safe_dump(tree))
        run_recipe(load_recipe("alone.yaml"), console=Console(file=io.StringIO()))
        ours, alone = (load_file(Path(folder, name, "adapter_model.safetensors")) for folder in ("out", "alone"))
        assert ours.keys() == alone.keys()
        assert all(torch.equal(ours[key], alone[key]) for key in ours), name
    again = load_recipe("out/recipe.yaml")
    assert list(again.adapters) == list(NAMES)
    assert list(find_adapters("out")) == sorted(NAMES)


def test_what_is_finished_is_not_trained_again(trained):
    """A resumed recipe must go on at the adapter that it was stopped at, and leave the others as they are."""
    weights = Path("out/intuitive/adapter_model.safetensors")
    before = weights.stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"adapters.intuitive: the output folder .* holds another run"):
        train()
    record = json.loads(Path("out/deep/run.json").read_text())
    Path("out/deep/run.json").write_text(json.dumps({**record, "status": "preempted"}))
    Path("out/deep/adapter_model.safetensors").unlink()
    runs, screen = train("training.run_policy=resume")
    assert "Adapter intuitive (1 of 3), finished before" in screen and "Adapter deep (3 of 3)\n" in screen
    assert weights.stat().st_mtime_ns == before
    assert Path("out/deep/adapter_model.safetensors").is_file()
    assert list(runs) == list(NAMES)
    assert runs["intuitive"].record.status == "finished" and runs["intuitive"].report
    with pytest.raises(ValueError, match="adapters.deep: the run in .* was made by another recipe"):
        train("training.run_policy=resume", "adapters.deep.training.learning_rate=0.5")


def test_all_adapters_are_looked_at_before_the_first_is_trained(desk):
    """A file that the third adapter lacks must not be found when two have been trained."""
    with pytest.raises((ValueError, OSError), match="adapters.deep: "):
        train("adapters.deep.data.train.path=missing.jsonl")
    with pytest.raises(ValueError, match="adapters.knowledge: .*the column 'question' holds None"):
        Path("bare.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
        train("adapters.knowledge.data.train.path=bare.jsonl")
    with pytest.raises(ValueError, match="adapters.deep: .*student's view has .* the limit is max_length=8"):
        train("adapters.deep.data.max_length=8")
    teacher = "adapters.deep.teacher={kind: local, model: model, cache: nowhere}"
    terms = "adapters.deep.loss.terms=[{kind: forward_kl}]"
    with pytest.raises(CacheError, match="adapters.deep: nowhere holds no cache"):
        train(teacher, terms)
    with pytest.raises(OSError, match="adapters.deep: .*teacher.model absent"):
        train("adapters.deep.teacher={kind: local, model: absent}", terms)
    make_model(seed=3).save_pretrained("other")
    make_tokenizer().save_pretrained("other")
    build_cache(expand(load_recipe("recipe.yaml", [teacher, terms]))["deep"], Path("nowhere"), make_codec("topk", k=4))
    with pytest.raises(CacheError, match="(?s)adapters.deep: .*teacher.model"):
        train(teacher.replace("model: model", "model: other"), terms)
    assert not Path("out").exists()
    assert issubclass(OutputFolderError, ValueError), "a folder's fault is one of the user's"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (CheckpointNotSaved("the disk is full"), CheckpointNotSaved),
        (NonFiniteLoss("the disk is full"), NonFiniteLoss),
        (OSError(28, "the disk is full"), OSError),
    ],
)
def test_an_error_in_training_names_the_adapter(desk, error, kind):
    """Hours into a run of several, a message that could be of any of them sends the user to the wrong one."""
    begun = []

    def breaks(recipe, **options):
        begun.append(recipe.training["output_dir"])
        if len(begun) == 2:
            raise error

    with pytest.raises(kind, match="adapters.knowledge: .*the disk is full"):
        run_adapters(load_recipe("recipe.yaml"), breaks, console=Console(file=io.StringIO()))
    assert begun == ["out/intuitive", "out/knowledge"]


def test_what_is_finished_needs_its_rows_no_more(trained):
    """Going on with the third adapter must not ask for files that served the first one only."""
    Path("rows.jsonl").rename("moved.jsonl")
    runs, screen = train("training.run_policy=resume")
    assert "Adapter deep (3 of 3), finished before" in screen and list(runs) == list(NAMES)


def test_reason_asks_a_run_and_keeps_what_was_said(trained):
    """From the recipe to the answer: each adapter must be asked in the form that it was trained with."""
    Path("asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    settings = GenerationSettings(max_new_tokens=6, temperature=1.0)
    told = reason("out", [{"prompt": "1 and 1?", "answer": "2"}], Asking(rounds=2, settings=settings))
    assert told["asked"]["extract"] == "gsm8k"
    assert told["summary"]["questions"] == told["summary"]["graded"] == 1
    assert 0 <= told["summary"]["cut"] <= 1
    base, tokenizer = make_model(), make_tokenizer()
    alone = Reasoners(
        load_adapters(base, {"knowledge": "out/knowledge"}),
        tokenizer,
        {"knowledge": PromptStyle(question="Rules for {prompt}:")},
        settings,
    )
    assert told["outcomes"][0]["rounds"][0]["knowledge"] == alone.write("knowledge", ["1 and 1?"], 1)[0]
    arguments = ["out", "--rows", "asked.jsonl", "--size", "2", "--rounds", "2", "--max-new-tokens", "4"]
    done = call(*arguments, "--json", "told.json", "--extract", "text")
    assert done.exit_code == 0, done.output
    assert "Questions   2," in done.output and "Accuracy" in done.output
    written = json.loads(Path("told.json").read_text())
    assert [outcome["gold"] for outcome in written["outcomes"]] == ["3", "4"], "chosen by seed"
    assert written["asked"]["settings"]["max_new_tokens"] == 4
    single = call("out", "1 and 1?", "--rounds", "1", "--max-new-tokens", "4", "--temperature", "0")
    assert single.exit_code == 0 and "Answer      " in single.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["out", "q", "--deep", "depp"], "deep: there is no adapter 'depp' (known: deep, intuitive, knowledge)"),
        (["out"], "expected a question or --rows FILE, got neither"),
        (["out", "q", "--rows", "rows.jsonl"], "got both"),
        (["out", " "], "the question is empty"),
        (["out", "q", "--size", "3"], "--size says how many rows are asked"),
        (["out", "q", "--temperature", "0"], "temperature is 0 and rounds is 20"),
        (["out", "q", "--extract", "gsm9k"], "there is no extractor 'gsm9k'"),
        (["out", "q", "--json", "out"], "--json: out is a folder"),
        (["nowhere", "q"], "nowhere is no folder"),
        (["model", "q"], "no folder in model holds recipe.yaml and adapter_config.json"),
    ],
)
def test_reason_refuses(desk, arguments, words):
    """What is wrong with a call must be said before a model is loaded: the adapters here couldn't be."""
    for name in NAMES:
        saved = saved_adapter(Path("out") / name, 0)
        (saved / "recipe.yaml").write_text("no recipe")
    done = call(*arguments)
    assert done.exit_code == 2, done.output
    assert words in done.output


def test_adapters_of_two_bases_are_not_mixed(trained):
    """An adapter on a base that it wasn't trained on writes nonsense and no error."""
    make_model(seed=5).save_pretrained("other")
    make_tokenizer().save_pretrained("other")
    path = Path("out/deep/recipe.yaml")
    path.write_text(path.read_text().replace("model: model", "model: other"))
    with pytest.raises(
        ValueError, match="the adapters intuitive and deep aren't on one base: student.model is 'model'"
    ):
        reason("out", [{"prompt": "q"}], Asking(rounds=1))
    path.write_text(path.read_text().replace("model: other", "model: model"))
    make_model(seed=5).save_pretrained("model")
    with pytest.raises(ValueError, match="intuitive: the student's model isn't the one of the run.*--model"):
        reason("out", [{"prompt": "q"}], Asking(rounds=1))


def test_lines_say_whether_there_was_an_agreement():
    """An answer that two ways share and one that a way gave most often must not look alike."""
    last = {"intuitive": "a\nb", "knowledge": "k", "deep": "d"}
    agreed = {"rounds": [last, last], "answer": "7", "agreed": True}
    assert question_lines(agreed)[0] == "Intuitive   a b"
    assert question_lines(agreed)[-1] == "Answer      7 (agreed on in round 2)"
    assert "not agreed on, after round 2" in question_lines({**agreed, "agreed": False})[-1]
    assert "none (no text states one" in question_lines({**agreed, "agreed": False, "answer": None})[-1]
    rounds = {"mean": 1.5, "histogram": {"1": 1, "2": 1}}
    few = {"questions": 2, "agreed": 1.0, "rounds": rounds, "texts": 4.5, "most_frequent": {"answer": "7", "share": 1}}
    told = "Rounds      1.50 on average (1 in 1, 1 in 2); 4.5 texts a question, 25.0% of them cut"
    assert summary_lines({**few, "cut": 0.25})[1] == told


def call(*arguments: str):
    """The command by itself."""
    import typer

    from hfkd.cli import reason as module

    app = typer.Typer()
    app.command()(module.reason)
    return CliRunner().invoke(app, list(arguments))
