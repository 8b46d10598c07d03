"""What may be in a file that is uploaded: masked in pages for people, refused in what a model is loaded by, and never
printed.
"""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from struct import pack

import pyarrow
import pytest
import yaml
from conftest import make_tokenizer
from pyarrow import parquet
from runs import PICTURE, SECRET, picture, whole_run

from hfkd.hub import plan_push
from hfkd.uploads import collect
from hfkd.uploads.contents import gone_over, kind_of_secret

HOME = str(Path.home() / "private" / "models")


def planned(folder: Path) -> dict[str, bytes]:
    """What would be uploaded, by its name."""
    return {
        one.path: one.content if isinstance(one.content, bytes) else one.content.read_bytes()
        for one in plan_push(folder)
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a run."""
    made = whole_run(tmp_path / "run")[0]
    (made / "README.md").write_text("---\nlibrary_name: transformers\n---\n\n# It\n")
    return made


@pytest.mark.parametrize("name", ["README.md", "report.html", "run.json", "report.json", "recipe.yaml"])
@pytest.mark.parametrize("found", [SECRET, HOME, "/home/anna/data/x.json", "{here}/x/y.json"])
def test_pages_for_people_are_masked(folder: Path, name: str, found: str) -> None:
    """A card, a record and a recipe are written by many hands; what is in them is public the next second."""
    found = found.format(here=folder)
    path = folder / name
    if path.suffix == ".json":
        path.write_text(json.dumps({**json.loads(path.read_text()), "note": f"from {found} on", "path": found}))
    elif path.suffix == ".yaml":
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "note": found}) + f"# made with {found}\n")
    else:
        path.write_text(path.read_text() + f"\nRead from `{found}` then.\n")
    before = path.read_bytes()
    sent = planned(folder)[name]
    assert found.encode() not in sent and path.read_bytes() == before, "the run's own file is changed"
    assert next(one for one in plan_push(folder) if one.path == name).masked
    if path.suffix == ".json":
        assert json.loads(sent)["status" if name == "run.json" else "k_shot"] is not None
    elif path.suffix == ".yaml":
        assert yaml.safe_load(sent)["training"]["max_steps"] == 3


def test_secrets_by_their_key(folder: Path) -> None:
    """A token of no known form is known by its key."""
    run = json.loads((folder / "run.json").read_text())
    run["recipe"]["student"]["load_kwargs"] = {"token": "plain words"}
    (folder / "run.json").write_text(json.dumps(run))
    sent = planned(folder)
    assert b"plain words" not in sent["run.json"]
    assert json.loads(sent["report.json"])["fidelity"]["after"]["worst_tokens"][0]["text"] == " the"


def test_what_holds_nothing_is_sent_as_it_is(folder: Path) -> None:
    """A second push of the same run must find the same bytes, and a digest must still fit."""
    for name, content in planned(folder).items():
        assert content == (folder / name).read_bytes(), name
    assert not any(one.masked for one in plan_push(folder))


@pytest.mark.parametrize(
    ("name", "key"), [("config.json", "note"), ("tokenizer_config.json", "extra"), ("generation_config.json", "x")]
)
@pytest.mark.parametrize(("found", "kind"), [(SECRET, "a token or a password"), (HOME, "a folder of this machine")])
def test_what_a_model_is_loaded_by_is_refused(folder: Path, name: str, key: str, found: str, kind: str) -> None:
    """One changed byte there and it is another model; so it isn't changed, and isn't sent."""
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), key: {"deep": [found]}}))
    with pytest.raises(ValueError, match=f"{name} in .* holds .*{kind}.*nothing was uploaded") as caught:
        planned(folder)
    assert found not in str(caught.value)


def test_notes_of_where_it_came_from_are_cut(folder: Path) -> None:
    """Libraries note the folder that they loaded from; nothing is loaded by it."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "name_or_path": f"{HOME}/small"}))
    sent = json.loads(planned(folder)["tokenizer_config.json"])
    assert sent["name_or_path"] == "small" and sent["pad_token"] == "<|im_end|>"
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_name_or_path": "owner/name"}))
    assert json.loads(planned(folder)["config.json"])["_name_or_path"] == "owner/name"


def test_tokens_of_a_vocabulary_are_no_paths(folder: Path) -> None:
    """A vocabulary holds `/home/user`, `/root` and whatever else was frequent; it must arrive as it is."""
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["vocab"] |= {"/root": 400, "/home/user": 401, "/usr/lib/python3": 402}
    path.write_text(json.dumps(data))
    assert planned(folder)["tokenizer.json"] == path.read_bytes()
    data["added_tokens"][0]["content"] = f"{HOME}/x"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        planned(folder)


def test_what_hides_in_weights_and_pictures(folder: Path, tmp_path: Path) -> None:
    """The header of a safetensors file has room for notes, and so has a picture."""
    header = json.dumps(
        {"__metadata__": {"made_in": HOME}, "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
    )
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(pack("<Q", len(header)) + header.encode() + b"\0")
    with pytest.raises(ValueError, match=r"model\.safetensors in .* holds a folder"):
        planned(folder)
    (folder / "model.safetensors").write_bytes(whole)
    (folder / "plots/loss.png").write_bytes(PICTURE + b"tEXtAuthor\0" + SECRET.encode())
    with pytest.raises(ValueError, match=r"loss\.png in .* holds what looks like a token"):
        planned(folder)
    (folder / "plots/loss.png").write_text("no picture")
    with pytest.raises(ValueError, match="isn't a PNG"):
        planned(folder)


@pytest.mark.parametrize(("name", "content"), [("run.json", b"{"), ("recipe.yaml", b"a: [\n"), ("README.md", b"\xff")])
def test_damaged_pages_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    """What can't be read can't be gone over."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} can't be read"):
        collect(tmp_path, (name,))


def test_a_chat_template_may_speak_of_tokens(tmp_path: Path) -> None:
    """`{% set tool_token = '<tool>' %}` is no secret, and a template that is changed makes other prompts."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% set tool_token = '<tool>' %}{{ tool_token }}</tool></a/b>"
    tokenizer.save_pretrained(tmp_path)
    assert {one.path for one in collect(tmp_path)} >= {"chat_template.jinja", "tokenizer.json"}
    assert not any(one.masked for one in collect(tmp_path))


def test_a_page_with_pictures_goes_and_they_stay_as_they_are(folder: Path) -> None:
    """A picture written as text looks like paths, some longer than any path can be: no run could be pushed."""
    page = folder / "report.html"
    written = base64.b64encode(picture()).decode()
    assert written in page.read_text() and len(written) > 50_000, "want the page of a run"
    assert planned(folder)["report.html"] == page.read_bytes()
    noise = base64.b64encode(random.Random(3).randbytes(300_000)).decode()
    beside = f'<img src="data:image/png;base64,/home/anna/{noise}"><p>/home/anna/x</p>'
    page.write_text(beside + "/" + "a" * 5000 + "/" + "b" * 5000)
    sent = planned(folder)["report.html"].decode()
    assert f"base64,/home/anna/{noise}" in sent and "<p>~/x</p>" in sent


def test_markup_is_not_eaten(folder: Path) -> None:
    """A value that ends at a tag took the tag along: the page was another one."""
    page = "<p><code>api_key=s3cr3t</code></p><p><code>token=***</code> of <b>/home/anna</b></p>"
    (folder / "report.html").write_text(page)
    sent = planned(folder)["report.html"].decode()
    assert sent == "<p><code>api_key=***</code></p><p><code>token=***</code> of <b>~</b></p>"


def test_points_of_a_picture_are_no_secrets(tmp_path: Path) -> None:
    """Among a hundred thousand bytes of noise some look like a password in an address; the picture is right."""
    path = tmp_path / "loss.png"
    points = b"://me:secret@x hf_" + b"Z" * 30
    path.write_bytes(PICTURE[:8] + pack(">I", len(points)) + b"IDAT" + points + b"1234")
    assert gone_over(path) == (path, "")
    path.write_bytes(PICTURE[:8] + pack(">I", len(points)) + b"tEXt" + points + b"1234")
    with pytest.raises(ValueError, match="a token or a password"):
        gone_over(path)


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer_config.json", "adapter_config.json"]
)
@pytest.mark.parametrize(
    "found",
    [
        {"api_key": "s3cr3t-passw0rd"},
        {"deep": [{"password": "hunter2hunter2"}]},
        {"note": "password=hunter2hunter2"},
        {"url": "https://host/x?X-Amz-Credential=a&X-Amz-Signature=0123456789abcdef"},
        {"note": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.abcdefgh"},
        {"note": "AIza" + "Sy" * 16 + "x"},
    ],
)
def test_secrets_by_name_and_form_are_refused(tmp_path: Path, name: str, found: dict) -> None:
    """A password has no form; the name that it stands under tells."""
    (tmp_path / name).write_text(json.dumps({"model_type": "llama", **found}))
    with pytest.raises(ValueError, match=f"{name} in .* holds what looks like a token") as caught:
        collect(tmp_path, (name,))
    assert "hunter2" not in str(caught.value) and "s3cr3t" not in str(caught.value)


ELSEWHERE = (
    *("/lustre/scratch/alice/models/x", "/gpfs/alice/x", "/some/alice/x", "~/alice/x", "file:///some/alice/x"),
    *("C:\\Users\\alice\\x", "D:/alice/x", "\\\\server\\alice\\x", "/data/My alice/x"),
)


@pytest.mark.parametrize("found", ELSEWHERE)
def test_paths_of_another_machine(folder: Path, found: str) -> None:
    """Trained on a cluster and pushed from a laptop is the usual way: nothing of the path is on the laptop."""
    for name in ("run.json", "report.json"):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "model": found}))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "model": found}))
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "_name_or_path": found, "text_config": {"_name_or_path": found}}))
    sent = planned(folder)
    assert not [name for name, content in sent.items() if b"alice" in content]
    assert json.loads(sent["run.json"])["model"] == yaml.safe_load(sent["recipe.yaml"])["model"] == "x"
    assert json.loads(sent["config.json"])["text_config"] == {"_name_or_path": "x"}
    path.write_text(json.dumps({**config, "other": found}))
    with pytest.raises(ValueError, match="a folder of this machine"):
        planned(folder)


@pytest.mark.parametrize("root", ["data", "gpfs", "lustre", "scratch", "workspace", "mnt", "work", "projects"])
def test_paths_of_clusters_in_sentences(folder: Path, root: str) -> None:
    """A card's sentence names the folder of a cluster as well."""
    card = folder / "README.md"
    card.write_text(card.read_text() + f"\nRead from `/{root}/alice/x`, file:///{root}/alice/x.\n")
    assert b"alice" not in planned(folder)["README.md"]


def test_what_a_model_needs_stays(tmp_path: Path) -> None:
    """Ids, addresses, tokens and templates look like secrets and paths to a filter that is too keen."""
    tokens = {f"{name}_token": f"<{name}>" for name in ("boi", "eoi", "image", "video", "audio", "eot", "user", "odd")}
    tokens |= {"fim_prefix_token": "fim prefix", "pad_token": "a word", "cls_token": {"content": "[CLS]"}}
    template = "{% set api_token = 'x' %}{% if '/think' in m %}ls /home/user/x /tmp/y{% endif %}password = {{ p }}"
    added = {"7": {"content": "/home/user"}, "8": {"content": "C:\\\\x\\y"}, "9": {"content": "token=abc"}}
    files = {
        "config.json": {
            "_name_or_path": "owner/name",
            "url": "https://huggingface.co/data/x",
            "auto_map": {"a": "b--c.D"},
        },
        "tokenizer_config.json": {**tokens, "chat_template": template, "added_tokens_decoder": added},
        "special_tokens_map.json": tokens,
        "tokenizer.json": {"model": {"vocab": {"/usr/lib": 1}, "merges": ["/h ome"], "unk_token": "x"}, "p": "/a/b|c"},
        "vocab.json": {"token=abc": 1, "/home/user": 2, "C:\\x\\y": 3},
    }
    for name, data in files.items():
        (tmp_path / name).write_text(json.dumps(data))
    (tmp_path / "chat_template.jinja").write_text(template)
    (tmp_path / "merges.txt").write_text("password = x\n/home /user\n")
    uploads = collect(tmp_path)
    assert {one.path for one in uploads} == {*files, "chat_template.jinja", "merges.txt"}
    assert not [one.path for one in uploads if one.content != tmp_path / one.path]
    (tmp_path / "chat_template.jinja").write_text(f"read {HOME}/x")
    with pytest.raises(ValueError, match="chat_template.jinja"):
        collect(tmp_path)


def test_notes_and_names_of_rows_and_weights(tmp_path: Path) -> None:
    """A table has room for notes, each column too; and a tensor's name is a text."""
    table = pyarrow.table({"a": [1]})
    (tmp_path / "x.parquet").write_bytes(b"")
    column = pyarrow.schema(
        [pyarrow.field("a", pyarrow.list_(pyarrow.field("b", "int64", metadata={"c": "/gpfs/a/b"})))]
    )
    cases = (
        table.replace_schema_metadata({"made_in": "/gpfs/alice/rows"}),
        table.replace_schema_metadata({"settings": json.dumps({"password": "hunter2hunter2"})}),
        pyarrow.table({"a": [[1]]}, schema=column),
        table.rename_columns([f"of {SECRET}"]),
    )
    for case in cases:
        parquet.write_table(case, tmp_path / "x.parquet")
        with pytest.raises(ValueError, match=r"x\.parquet in .* holds"):
            gone_over(tmp_path / "x.parquet")
    parquet.write_table(table, tmp_path / "x.parquet")
    assert gone_over(tmp_path / "x.parquet")[1] == ""
    header = json.dumps({f"of {SECRET}": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}})
    (tmp_path / "model.safetensors").write_bytes(pack("<Q", len(header)) + header.encode() + b"\0")
    with pytest.raises(ValueError, match="a token or a password"):
        gone_over(tmp_path / "model.safetensors")


def test_what_a_secret_is() -> None:
    """A filter that finds nothing, and one that finds everything, are both of no use."""
    assert kind_of_secret(f"x {SECRET} y") and kind_of_secret("https://me:secret@host/x")
    assert kind_of_secret(f"in {HOME}/x") and not kind_of_secret(f"in {HOME}/x", paths=False)
    for harmless in ("https://huggingface.co/me/it/tree/main", "the token = of a text", "a/b/c", "***", "1/2/3"):
        assert not kind_of_secret(harmless), harmless
