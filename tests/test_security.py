"""Whose code may run: that of this package, and what a recipe or a caller names; nothing that lies beside weights."""

from __future__ import annotations

import ast
import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file
from training import ROWS, make_trainer
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from hfkd import CrossTokenizerTeacher, DistillationConfig, DistillationTrainer, LocalTeacher
from hfkd.cache import make_codec
from hfkd.checkpoint import MANIFEST, publish
from hfkd.cli.main import app
from hfkd.loading import load_adapter, load_causal_lm
from hfkd.recipe import RecipeError, load_recipe
from hfkd.recipe.own_code import code_lines, own_code
from hfkd.run import run_recipe
from hfkd.run.caching import build_cache
from hfkd.run.evaluation import evaluate_recipe

ROOT = Path(__file__).resolve().parent.parent

# Written into the repository of a model; the marker says whose.
REMOTE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "own_llama"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


class Planted:
    """Leaves a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mknod, (self.marker,)


def save_remote(folder: Path, seed: int = 0) -> Path:
    """A model whose architecture and tokenizer are code in its own folder; returns the marker that the code leaves."""
    make_model(seed=seed).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    marker = folder.parent.resolve() / f"{folder.name}.ran"
    (folder / "own.py").write_text(REMOTE.format(marker=str(marker)))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own_llama", "architectures": ["Model"]}
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    described = json.loads((folder / "tokenizer_config.json").read_text())
    described |= {"auto_map": {"AutoTokenizer": [None, "own.Tokenizer"]}, "tokenizer_class": "Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return marker


def save_plain(folder: Path, seed: int = 0) -> Path:
    """A model without code of its own."""
    make_model(seed=seed).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def save_pickled(folder: Path, name: str, config: Callable[[Path], Any]) -> Path:
    """A folder whose only weights are a pickle that leaves a marker."""
    folder.mkdir()
    config(folder)
    marker = folder.parent / "unpickled"
    with (folder / name).open("wb") as stream:
        pickle.dump(Planted(marker), stream)
    return marker


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with plain models, models with code, and a recipe of one step."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    for number, name in enumerate(("student", "teacher", "plain")):
        save_plain(tmp_path / name, seed=number)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:12]))
    recipe = {
        "student": {"model": "student"},
        "teacher": {"kind": "local", "model": "teacher"},
        "data": {"train": {"path": "rows.jsonl"}, "generation": {"max_new_tokens": 2}},
        "evaluation": {"shots": [0], "size": 2, "max_new_tokens": 2},
        "training": {
            "output_dir": "out",
            "max_steps": 1,
            "per_device_train_batch_size": 2,
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
        },
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith(("transformers_modules", "own_"))]:
        del sys.modules[name]


def train(*overrides: str) -> None:
    run_recipe(load_recipe("recipe.yaml", overrides))


def trainer(**parts: Any) -> DistillationTrainer:
    args = DistillationConfig(
        "out", max_steps=1, use_cpu=True, disable_tqdm=True, model_init_kwargs=parts.pop("init", None)
    )
    settings = {"model": "student", "teacher": "teacher", "train_dataset": ROWS[:4], **parts}
    return DistillationTrainer(settings.pop("model"), settings.pop("teacher"), args=args, **settings)


CROSS = "teacher={kind: cross_tokenizer, model: remote}"
TRUST = ", trust_remote_code: true"


def members(first: str, second: str) -> str:
    """An override with two teachers, of which the first has code of its own."""
    one, other = f"{{kind: local, model: remote{first}}}", f"{{kind: local, model: plain{second}}}"
    return f"teacher={{kind: mixture, members: {{a: {one}, b: {other}}}}}"


# What is done with a model whose code isn't trusted, while the other one's is.
REFUSED: dict[str, Callable[[], Any]] = {
    "student": lambda: train("student.model=remote", "teacher.trust_remote_code=true"),
    "teacher": lambda: train("teacher.model=remote", "student.trust_remote_code=true"),
    "member": lambda: train(members("", TRUST), "student.trust_remote_code=true"),
    "cross_tokenizer": lambda: train(
        CROSS, "loss.terms=[{kind: uld}, {kind: cross_entropy}]", "student.trust_remote_code=true"
    ),
    "evaluate": lambda: evaluate_recipe(load_recipe("recipe.yaml", ["student.model=remote"])),
    "cache, student": lambda: build_cache(
        load_recipe("recipe.yaml", ["student.model=remote", "teacher.trust_remote_code=true"]),
        "cache",
        make_codec("topk", k=4),
    ),
    "cache, teacher": lambda: build_cache(
        load_recipe("recipe.yaml", ["teacher.model=remote", "student.trust_remote_code=true"]),
        "cache",
        make_codec("topk", k=4),
    ),
    "trainer": lambda: trainer(model="remote"),
    "trainer, teacher": lambda: trainer(teacher="remote", init={"trust_remote_code": True}),
    "LocalTeacher": lambda: trainer(teacher=LocalTeacher("remote"), init={"trust_remote_code": True}),
    "CrossTokenizerTeacher": lambda: CrossTokenizerTeacher("remote"),
    "load_kwargs": lambda: train("student.model=remote", "student.load_kwargs={trust_remote_code: true}"),
    "load_causal_lm": lambda: load_causal_lm("remote"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_code_beside_weights_does_not_run(desk: Path, case: str) -> None:
    """Whoever publishes a model would own every machine that distils it; the other model's flag is no consent."""
    marker = save_remote(desk / "remote")
    with pytest.raises((ValueError, OSError), match="trust_remote_code"):
        REFUSED[case]()
    assert not marker.exists()


ALLOWED: dict[str, Callable[[], Any]] = {
    "student": lambda: train("student.model=remote", "student.trust_remote_code=true"),
    "teacher": lambda: train("teacher.model=remote", "teacher.trust_remote_code=true"),
    "member": lambda: train(members(TRUST, "")),
    "trainer": lambda: trainer(model="remote", init={"trust_remote_code": True}),
    "LocalTeacher": lambda: trainer(teacher=LocalTeacher("remote", trust_remote_code=True)),
    "CrossTokenizerTeacher": lambda: CrossTokenizerTeacher("remote", trust_remote_code=True),
}


@pytest.mark.parametrize("case", ALLOWED)
def test_code_that_is_trusted_runs(desk: Path, case: str) -> None:
    """A flag that does nothing would make the test above one that can't fail."""
    marker = save_remote(desk / "remote")
    ALLOWED[case]()
    assert marker.exists()


@pytest.mark.parametrize("trusted", [False, True])
def test_a_way_to_generate_is_code_too(desk: Path, trusted: bool) -> None:
    """A folder can bring its own `generate`, beside a model that needs no code."""
    save_plain(desk / "own")
    (desk / "own" / "custom_generate").mkdir()
    code = f"open({str(desk / 'ran')!r}, 'w').close()\ndef generate(*_, **__): raise ValueError('own')\n"
    (desk / "own" / "custom_generate" / "generate.py").write_text(code)
    model = load_causal_lm("own", trust_remote_code=trusted)
    if trusted:
        with pytest.raises(ValueError, match="own"):
            model.generate(torch.ones(1, 2, dtype=torch.long), max_new_tokens=1)
    else:
        model.generate(torch.ones(1, 2, dtype=torch.long), max_new_tokens=1)
    assert (desk / "ran").exists() is trusted


def plain_config(folder: Path) -> None:
    save_plain(folder)
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    "load",
    [
        lambda: train("student.model=pickled"),
        lambda: train("teacher.model=pickled"),
        lambda: evaluate_recipe(load_recipe("recipe.yaml", ["student.model=pickled"])),
        lambda: trainer(model="pickled"),
        lambda: trainer(teacher="pickled"),
        lambda: trainer(model="pickled", init={"use_safetensors": False}),
        lambda: train("student.model=pickled", "student.load_kwargs={use_safetensors: false}"),
        lambda: load_causal_lm("pickled", gguf_file=None),
    ],
)
def test_pickled_weights_are_refused(desk: Path, load: Callable[[], Any]) -> None:
    """A pickle is a program; a folder with no other weights must not be read, and not be taken for a damaged one."""
    marker = save_pickled(desk / "pickled", "pytorch_model.bin", plain_config)
    with pytest.raises((ValueError, OSError), match="(?i)pickled weights"):
        load()
    assert not marker.exists()


def test_a_hub_id_is_read_from_safetensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a repository of the hub holds isn't seen before it is fetched; transformers has to be told."""
    asked = {}

    def loaded(name: str, **options: Any) -> tuple[Any, dict]:
        asked.update(options)
        return make_model(), {}

    monkeypatch.setattr("hfkd.loading.AutoModelForCausalLM.from_pretrained", loaded)
    load_causal_lm("org/name", use_safetensors=None)
    assert asked["use_safetensors"] is True and asked["trust_remote_code"] is False


@pytest.mark.parametrize("key", ["student", "teacher"])
@pytest.mark.parametrize("option", ["trust_remote_code: true", "use_safetensors: false"])
def test_load_kwargs_open_nothing(desk: Path, key: str, option: str) -> None:
    """A flag in there would hold for the model, pass by what the user is told, and be overlooked by readers."""
    with pytest.raises(RecipeError, match=f"{key}.load_kwargs: .*{option.partition(':')[0]}"):
        load_recipe("recipe.yaml", [f"{key}.load_kwargs={{{option}}}"])
    with pytest.raises(RecipeError, match="data.generation.vllm: trust_remote_code is the student's"):
        load_recipe("recipe.yaml", ["data.answer=student", "data.generation.vllm={trust_remote_code: true}"])


def adapter_config(folder: Path) -> None:
    run = make_trainer(folder / "run")
    run.model.save_pretrained(folder)
    (folder / "adapter_model.safetensors").unlink()


def test_pickled_adapters_are_refused(desk: Path) -> None:
    """An adapter is passed around more than a model, and peft reads its pickle when there is nothing else."""
    marker = save_pickled(desk / "adapter", "adapter_model.bin", adapter_config)
    with pytest.raises(OSError, match="pickled weights only .adapter_model.bin"):
        evaluate_recipe(load_recipe("recipe.yaml"), adapter=desk / "adapter")
    assert not marker.exists()
    with pytest.raises(OSError, match="the adapter in .*plain can't be loaded"):
        load_adapter(make_model(), desk / "plain")


@pytest.mark.parametrize(
    ("options", "fits"),
    [
        ({"attn_implementation": "someone/kernel"}, False),
        ({"attn_implementation": {"": "someone/kernel"}}, False),
        ({"attn_implementation": "sdpa"}, True),
    ],
)
def test_kernels_of_the_hub_are_code_too(desk: Path, options: dict[str, Any], fits: bool) -> None:
    """An attention that is downloaded is remote code by another name."""
    if fits:
        load_causal_lm("student", **options)
        return
    with pytest.raises(ValueError, match="attn_implementation someone/kernel is code of the hub; set trust_remote_"):
        load_causal_lm("student", **options)


@pytest.mark.parametrize("option", ["use_kernels", "allow_all_kernels", "kernel_config"])
def test_kernels_for_layers_are_code_too(desk: Path, option: str) -> None:
    """These have code of the hub take the place of layers; what runs must be trusted, and told before it does."""
    words = f"{option} lets code of the hub run; set trust_remote_code to true"
    with pytest.raises(ValueError, match=words):
        load_causal_lm("student", **{option: True})
    with pytest.raises(ValueError, match=words):
        trainer(teacher=LocalTeacher("teacher", load_kwargs={option: True})).train()
    load_causal_lm("student", **{option: False if option != "kernel_config" else None})
    for key in ("student", "teacher"):
        override = f"{key}.load_kwargs={{{option}: true}}"
        with pytest.raises(RecipeError, match=f"{key}.load_kwargs: {option} .* {key}.trust_remote_code"):
            load_recipe("recipe.yaml", [override])
        recipe = load_recipe("recipe.yaml", [override, f"{key}.trust_remote_code=true"])
        assert f"{key}.trust_remote_code" in code_lines(recipe)[1]


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "pytorch_model.bin"]
)
def test_resuming_runs_no_pickle(desk: Path, name: str) -> None:
    """A checkpoint that somebody passes on must not be a program: what of it is pickled is read as plain values, and
    what isn't needed isn't read. Fails where a version of transformers goes back to trusting it.
    """
    first = make_trainer("out", save_strategy="steps", save_steps=1)
    first.train()
    checkpoint = desk / "out" / "checkpoint-1"
    assert not list((desk / "out").rglob("training_args.bin"))
    marker = desk / "unpickled"
    made = json.loads((checkpoint / MANIFEST).read_text())
    (checkpoint / MANIFEST).unlink()
    (desk / "draft").mkdir()
    draft = checkpoint.rename(desk / "draft" / checkpoint.name)
    torch.save(Planted(marker), draft / name)
    publish(draft, checkpoint, made)  # whoever plants a pickle can write a manifest for it as well
    again = make_trainer("out", save_strategy="no")
    if name == "training_args.bin":
        again.train(resume_from_checkpoint=str(checkpoint))
    else:
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            again.train(resume_from_checkpoint=str(checkpoint))
    assert not marker.exists()


def test_the_planted_pickle_works(tmp_path: Path) -> None:
    """The guard of the tests above: a pickle that leaves no marker when it is read would prove nothing."""
    marker = tmp_path / "unpickled"
    torch.save(Planted(marker), tmp_path / "planted")
    torch.load(tmp_path / "planted", weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mknod [ran]", "!!python/name:os.system", "!mine {}"])
def test_a_recipe_makes_no_objects(desk: Path, tag: str) -> None:
    """YAML can name any function and its arguments; a recipe from a stranger would be a program."""
    text = Path("recipe.yaml").read_text()
    Path("recipe.yaml").write_text(text + f"hub:\n  repo_id: {tag}\n")
    with pytest.raises(RecipeError, match="the tag .* asks for an object; a recipe holds plain values"):
        load_recipe("recipe.yaml")
    Path("recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match="hub.repo_id: .* asks for an object"):
        load_recipe("recipe.yaml", [f"hub.repo_id={tag}"])
    assert not Path("ran").exists()


def calls(path: Path) -> list[tuple[str, str]]:
    """Function and its first words of each call in a file of the package."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call):
            found.append((ast.unparse(node.func), ast.unparse(node)))
    return found


def test_one_place_imports_and_one_place_loads() -> None:
    """A new call somewhere else would pass by all that is checked in these places."""
    wanted = {
        "importlib.import_module": {"hfkd/named.py", "hfkd/__init__.py", "hfkd/eval/metrics/__init__.py"},
        "AutoModelForCausalLM.from_pretrained": {"hfkd/loading.py"},
        "AutoTokenizer.from_pretrained": {"hfkd/loading.py"},
        "AutoConfig.from_pretrained": {"hfkd/loading.py"},
        "PeftModel.from_pretrained": {"hfkd/loading.py"},
    }
    never = ("torch.load", "pickle.load", "pickle.loads", "eval", "exec", "yaml.unsafe_load", "yaml.full_load")
    seen: dict[str, set[str]] = {name: set() for name in wanted}
    for path in sorted((ROOT / "hfkd").rglob("*.py")):
        where = path.relative_to(ROOT).as_posix()
        for name, text in calls(path):
            assert name not in never and not name.endswith("__import__"), f"{where}: {text}"
            assert name != "yaml.load" or "_StrictLoader" in text, f"{where}: {text}"
            if name in wanted:
                seen[name].add(where)
            elif name.endswith(".from_pretrained"):
                raise AssertionError(f"{where}: {text} loads past hfkd/loading.py")
    assert seen == wanted


OWN = """
from pathlib import Path
import sys
print("imported", __name__, flush=True)
from hfkd import EmaTeacher
from hfkd.losses import ReverseKL
class Loss(ReverseKL): pass
class Teacher(EmaTeacher): pass
def spans(ids): return [(0, len(ids))]
def weights(row, ids): return [1.0] * len(ids)
def row(row): return row
"""
OWN_NAMES = {
    "teacher.kind": "own_teacher:Teacher",
    "loss.terms.0.kind": "own_loss:Loss",
    "loss.terms.1.spans": "own_spans:spans",
    "data.token_weights": "own_weights:weights",
    "data.train.format": "own_format:row",
    "evaluation.format": "own_eval:row",
    "evaluation.forgetting.0.format": "own_other:row",
}


def write_own(desk: Path) -> list[str]:
    """Modules of the user's own, and the overrides that name each at its place."""
    for name in OWN_NAMES.values():
        (desk / f"{name.partition(':')[0]}.py").write_text(OWN)
    return [
        "teacher={kind: 'own_teacher:Teacher', options: {decay: 0.5}}",
        "loss.terms=[{kind: 'own_loss:Loss'}, {kind: span_correlation, spans: 'own_spans:spans'}, "
        "{kind: cross_entropy}]",
        "data.token_weights='own_weights:weights'",
        "data.train.format='own_format:row'",
        "evaluation={path: rows.jsonl, split: train, size: 2, shots: [0], format: 'own_eval:row', "
        "forgetting: [{path: rows.jsonl, size: 2, demonstrations: 0, format: 'own_other:row'}]}",
    ]


@pytest.mark.parametrize("command", ["train", "evaluate", "cache"])
def test_code_is_named_before_it_is_imported(desk: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """Code that has run before it is told of is told of too late."""
    overrides, names = [*write_own(desk), "student.trust_remote_code=true"], dict(OWN_NAMES)
    out = ["--out", "cache"] if command == "cache" else []
    if out:
        overrides[0] = "data.token_weights='own_weights:weights'"  # no own teacher can be cached
        names.pop("teacher.kind")
    monkeypatch.syspath_prepend(str(desk))
    monkeypatch.setattr(sys, "argv", ["hfkd", command])
    done = CliRunner().invoke(app, [command, "recipe.yaml", *overrides, *out])
    told = done.output.index("This recipe imports code of its own:")
    first = done.output.index("imported own_")
    assert told < first, done.output
    lines = done.output[told:].splitlines()
    assert sorted(lines[1 : 1 + len(names)]) == sorted(f"  {name} ({key})" for key, name in names.items()), lines
    imported = {word.split()[1] for word in done.output.splitlines() if word.startswith("imported own_")}
    unused = {"own_teacher", "own_weights"} if command == "evaluate" else set()
    assert imported == {name.partition(":")[0] for name in names.values()} - unused, done.output
    assert done.exit_code == 0, done.output
    assert "This recipe lets the code of model repositories run:\n  student (student.trust_remote_c" in done.output


def test_a_name_cannot_hide_itself(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal obeys control characters: a name with some could wipe away the line that tells of it."""
    recipe = yaml.safe_load(Path("recipe.yaml").read_text())
    recipe["data"]["token_weights"] = "json:loads\x1b[2K\r"
    recipe["data"]["prompt"] = {"builder": "json:\u202edumps\n"}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(sys, "argv", ["hfkd", "train"])
    done = CliRunner().invoke(app, ["train", "recipe.yaml"])
    assert "  json:loads\\x1b[2K\\r (data.token_weights)\n" in done.output, done.output
    assert "  json:\\u202edumps\\n (data.prompt.builder)\n" in done.output, done.output
    assert done.exit_code == 2 and "Error: " in done.output
    assert not {"\x1b", "\r", "\u202e"} & set(done.output), "neither there nor in the error that follows"


def test_a_recipe_of_plain_values_says_nothing(desk: Path) -> None:
    """A warning that always comes is read by nobody."""
    recipe = load_recipe("recipe.yaml", ["data.train.path=rows.jsonl", "data.prompt.question='Q:{prompt}'"])
    assert code_lines(recipe) == []
    assert own_code(load_recipe("recipe.yaml", ["data.prompt.builder='json:dumps'"])) == {
        "data.prompt.builder": "json:dumps"
    }


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("teacher={kind: 'json:JSONDecoder'}", "teacher.kind: .*expected a subclass of hfkd.teachers.Teacher"),
        ("loss.terms=[{kind: 'json:JSONDecoder'}]", "expected a subclass of hfkd.losses.TokenLoss or hfkd.losses.Sta"),
        ("data.token_weights='json:__doc__'", "data.token_weights: .* expected a function"),
        ("data.prompt.builder='json:__doc__'", "data.prompt.builder: .* expected a function"),
        ("data.train.format='json:__doc__'", "the format: .* expected a function"),
        ("loss.terms=[{kind: forward_kl}, {kind: span_correlation, spans: json}]", "expected package.module:Name"),
        ("data.train.format='json:'", "expected package.module:Name"),
    ],
)
def test_what_is_named_is_of_its_kind(desk: Path, override: str, words: str) -> None:
    """Any callable would be called with the user's data; a class of another kind fails deep inside the run."""
    with pytest.raises(ValueError, match=words):
        train(override)


def test_checkpoints_and_caches_are_safetensors(desk: Path) -> None:
    """What this package reads of its own files is safetensors, JSON and Parquet; a pickle of ours would be a hole."""
    build_cache(load_recipe("recipe.yaml"), "cache", make_codec("hidden"))
    assert {path.suffix for path in Path("cache").iterdir()} <= {".json", ".parquet", ".safetensors"}
    ours = {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    make_trainer("run", save_strategy="steps", save_steps=1).train()
    pickled = {path.name for path in Path("run/checkpoint-1").iterdir() if path.suffix in (".pt", ".pth", ".bin")}
    assert pickled == ours
    assert load_file("run/checkpoint-1/adapter_model.safetensors")


def test_a_folder_with_both_is_read_from_safetensors(desk: Path) -> None:
    """Many models of the hub carry both; the pickle beside must be neither read nor complained of."""
    marker = desk / "unpickled"
    torch.save(Planted(marker), desk / "student" / "pytorch_model.bin")
    model = load_causal_lm("student")
    assert isinstance(model, LlamaForCausalLM) and isinstance(model.config, LlamaConfig)
    assert not marker.exists()
