"""What a run was: its recipe, versions, hardware kind, data and teacher fingerprints, and results, in one `run.json`.

Also decides whether an output folder may be used. It reads no environment variable and keeps no host or user name;
`hfkd.masking` goes over all that is written. It knows no trainer: callers hand in plain data.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hfkd.files import try_folder, write_json
from hfkd.masking import is_secret, shareable

RECORD_NAME = "run.json"
UNFINISHED = "_unfinished"
"""The folder, in that of a run, of checkpoints that are being written or removed; Trainer's uploads leave out names
that begin like this.
"""
BATCHES = "_nonfinite-step-"
"""What the names of folders begin with that hold the batches of a step whose loss or gradient was no number: rows of
the data, which no upload may take.
"""
GOLD_BASELINE = "gold_baseline"
"""The folder, in that of a run, of the fine-tuning that it is compared with."""
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "trl", "hfkd")
# What one run leaves in its folder besides checkpoints and the weights, which the next save replaces.
_RUN_FILES = (
    *(RECORD_NAME, "report.json", "report.html", "predictions.jsonl", "recipe.yaml", "README.md"),
    *("plots/*.png", "teacher_answers.jsonl"),
)
# A full model that stays beside a new adapter would be loaded, or uploaded, with it.
_WEIGHT_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "adapter_config.json",
    "config.json",
    "generation_config.json",
)
# Settings that may differ between a run and its continuation. How far it goes may not: which rows are visited, in
# which order, and the learning rate of each step follow from it. How many rows a step has on one process may: another
# number of processes needs it, and a checkpoint's manifest tells whether the rows of a step are as many as before.
_FREE_TRAINING_KEYS = re.compile(
    r"^(output_dir|run_policy|resume_from_checkpoint|report_to|run_name|"
    r"project|disable_tqdm|"
    r"log_.*|logging_.*|save_.*|trackio_.*|push_to_hub|hub_.*|overwrite_output_dir|"
    r"per_device_(train|eval)_batch_size|gradient_accumulation_steps|"
    r"dataloader_(num_workers|prefetch_factor|pin_memory|persistent_workers)|"
    r"ddp_.*|restore_callback_states_from_checkpoint)$"
)
# Free too, unless what an evaluation finds changes the weights that are kept.
_EVALUATION_KEYS = re.compile(r"^eval_.*$")
BY_EVALUATION = ("reduce_lr_on_plateau", "greedy")
"""Schedules of the learning rate that follow from what evaluations in training find."""
_WATCHED = ("fidelity", "samples")  # of `evaluation`: measured or shown, and nothing follows from them
_NOT_SET, _SHOWN = "not set", 80


class OutputFolderError(ValueError):
    """The output folder holds another run, or a run that this recipe doesn't continue."""


@dataclasses.dataclass
class RunRecord:
    """Everything that `run.json` says. Durations (seconds) and energy are sums over the sessions of a run that was
    continued; `status` is started, finished, failed or preempted."""

    recipe: dict[str, Any]
    fingerprint: str
    status: str = "started"
    command: list[str] = dataclasses.field(default_factory=list)
    versions: dict[str, str] = dataclasses.field(default_factory=lambda: package_versions())
    hardware: dict[str, Any] = dataclasses.field(default_factory=lambda: describe_hardware())
    student: dict[str, Any] = dataclasses.field(default_factory=dict)
    parameters: dict[str, int] = dataclasses.field(default_factory=dict)
    origins: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    teacher: dict[str, Any] = dataclasses.field(default_factory=dict)
    objective: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    durations: dict[str, float] = dataclasses.field(default_factory=dict)
    energy: dict[str, Any] = dataclasses.field(default_factory=dict)
    sessions: int = 1

    def take_over(self, folder: str | Path) -> None:
        """Begin with the time and the energy of the sessions before this one, which continues their run."""
        former = read_record(folder)
        if former:
            self.sessions = int(former.get("sessions", 1)) + 1
            self.durations = {str(name): float(spent) for name, spent in (former.get("durations") or {}).items()}
            self.energy = dict(former.get("energy") or {})

    def add_energy(self, used: Mapping[str, Any]) -> None:
        """Add what a session used. Where one of them couldn't be measured the sum isn't known.

        Args:
            used: `EnergyMeter.to_dict` of the session.
        """
        if self.sessions == 1:
            self.energy = dict(used)
        elif used and self.energy:
            devices = [*self.energy["devices"], *used["devices"]]
            sums = {name: round(self.energy[name] + used[name], 3) for name in ("joules", "seconds")}
            self.energy = {**used, **sums, "devices": list(dict.fromkeys(devices))}
        else:
            self.energy = {}

    def to_dict(self) -> dict[str, Any]:
        """The record as it is written: masked, and plain enough for JSON."""
        return shareable(json.loads(json.dumps(dataclasses.asdict(self), default=str)))

    def write(self, folder: str | Path) -> Path:
        """Write `run.json` into the folder, whole or not at all, and return its path."""
        return write_json(Path(folder) / RECORD_NAME, self.to_dict())


def package_versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide the numbers, as far as they are installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "hfkd" not in versions:
        import hfkd

        versions["hfkd"] = getattr(hfkd, "__version__", "unknown")
    return versions


def describe_hardware() -> dict[str, Any]:
    """Kind and number of the devices and processes; no host name and no user name."""
    import torch

    kind = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    count = torch.accelerator.device_count() if kind != "cpu" else 1
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    hardware: dict[str, Any] = {
        "device": kind,
        "count": count,
        "processes": processes,
        "cpu_threads": torch.get_num_threads(),
    }
    if kind == "cuda":
        hardware["name"] = torch.cuda.get_device_name(0)
    return hardware


def rows_fingerprint(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """`{"rows": n, "sha256": ...}` of rows in their order, so that a result names the data that it was made with."""
    digest, count = hashlib.sha256(), 0
    for row in rows:
        digest.update(json.dumps(dict(row), sort_keys=True, ensure_ascii=False, default=str).encode())
        count += 1
    return {"rows": count, "sha256": digest.hexdigest()}


def recipe_fingerprint(resolved: Mapping[str, Any]) -> str:
    """A hash of what decides the weights: the recipe without how long it trains, what it writes where and the tokens
    that it fetches with, and with a cache by its presence alone: `check_same_cache` compares what is in it.
    """
    return hashlib.sha256(json.dumps(_deciding(resolved), sort_keys=True, default=str).encode()).hexdigest()


def recipe_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys of what decides the weights that differ, each with its value then and now; secrets stay masked.

    Args:
        before: The recipe of a `run.json`, which is masked.
        now: The resolved recipe that is compared with it.
    """
    old, new = (shareable(json.loads(json.dumps(_deciding(one), default=str))) for one in (before, now))
    return [f"{key} (was {_shown(was)}, is {_shown(now_is)})" for key, was, now_is in _unlike(old, new)]


# Keys that recipes didn't always have; without a value they change nothing.
_ADDED = frozenset({"adapters", "reinforcement", "sampler", "transforms", "revise"})


def _deciding(resolved: Mapping[str, Any]) -> dict[str, Any]:
    kept = {section: _without_secrets(section, value) for section, value in resolved.items() if section != "hub"}
    kept = {section: value for section, value in kept.items() if value or section not in _ADDED}
    kept["data"] = {key: value for key, value in (kept.get("data") or {}).items() if value or key not in _ADDED}
    if (kept.get("teacher") or {}).get("cache") is not None:
        kept["teacher"] = {**kept["teacher"], "cache": "cached"}
    if kept.get("evaluation") is not None:
        kept["evaluation"] = {key: value for key, value in kept["evaluation"].items() if key not in _WATCHED}
    training = resolved.get("training") or {}
    decides = training.get("load_best_model_at_end") or training.get("lr_scheduler_type") in BY_EVALUATION
    kept["training"] = {
        key: value
        for key, value in training.items()
        if not (_FREE_TRAINING_KEYS.match(key) or (not decides and _EVALUATION_KEYS.match(key)))
    }
    return kept


def _without_secrets(section: str, value: Any, inside: bool = False) -> Any:
    """A section without the tokens that models and rows are fetched with; what a teacher's own class takes as options
    decides the weights, whatever its name.
    """
    if isinstance(value, list | tuple):
        return [_without_secrets(section, item, inside) for item in value]
    if not isinstance(value, Mapping):
        return value
    fetching = ("load_kwargs",) if section == "teacher" else ("load_kwargs", "options")
    return {
        key: _without_secrets(section, item, inside or key in fetching)
        for key, item in value.items()
        if not (inside and is_secret(key, item))
    }


def _unlike(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where nested data differ, by dotted keys as they are written on a command line."""
    if isinstance(old, list) and isinstance(new, list):
        old, new = ({str(place): item for place, item in enumerate(one)} for one in (old, new))
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted(old.keys() | new.keys()):
            yield from _unlike(old.get(key, _NOT_SET), new.get(key, _NOT_SET), f"{name}.{key}" if name else key)
    elif old != new:
        yield name, old, new


def _shown(value: Any) -> str:
    text = value if value is _NOT_SET else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def check_writable(folder: str | Path) -> None:
    """Refuse a folder that can't be written into, before anything is loaded; makes no folder.

    Args:
        folder: The output folder; it need not exist.

    Raises:
        OSError: It, or the folder that it would be made in, can't be written into.
    """
    try:
        try_folder(folder)
    except OSError as error:
        raise OSError(
            f"The output folder {folder} can't be written into ({error.strerror or error}): nothing of the run could "
            "be kept. Choose another training.output_dir, or mend the permissions."
        ) from error


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def check_output_folder(
    folder: str | Path, policy: str, fingerprint: str, recipe: Mapping[str, Any] | None = None
) -> None:
    """Refuse a folder that can't be written into, or that holds another run, unless the policy is to resume it or to
    overwrite it. Changes nothing.

    Args:
        folder: The output folder; it need not exist.
        policy: `refuse`, `resume` or `overwrite`.
        fingerprint: `recipe_fingerprint` of the recipe that wants to run.
        recipe: The resolved recipe itself, to say which of its keys differ.

    Raises:
        OutputFolderError: The folder holds a run and the policy is `refuse`, or it is `resume` and the recipe differs.
        OSError: It can't be written into.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise OutputFolderError(f"training.output_dir is {folder}, which is a file; expected a folder")
    check_writable(folder)
    record = folder / RECORD_NAME
    if policy == "overwrite" or not (record.exists() or checkpoints(folder)):
        return
    if policy == "refuse":
        raise OutputFolderError(
            f"the output folder {folder} holds another run; choose another training.output_dir, continue that run "
            "with --resume (training.run_policy=resume), or delete it and start anew with --overwrite "
            "(training.run_policy=overwrite)"
        )
    if not record.exists():
        raise OutputFolderError(
            f"{folder} has checkpoints but no {RECORD_NAME}, so it can't be known whether this recipe made them; "
            "start anew with --overwrite or choose another training.output_dir"
        )
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
        before, made_by = known["fingerprint"], dict(known.get("recipe") or {})
    except (ValueError, KeyError, TypeError):
        raise OutputFolderError(
            f"{record} is damaged, so the run can't be resumed; start anew with --overwrite"
        ) from None
    if before != fingerprint:
        keys = recipe_differences(made_by, recipe) if recipe is not None else []
        if keys:
            what = "these keys differ: " + ", ".join(keys)
        else:
            what = "no key that run.json shows differs: it may be a secret or the folder that paths begin with"
        raise OutputFolderError(
            f"the run in {folder} was made by another recipe (fingerprint {str(before)[:12]}, this one has "
            f"{fingerprint[:12]}); {what}. Only settings of logging, output, evaluation in training, workers and "
            "the split of a step's rows may differ when a run is resumed: set the others back, choose another "
            "training.output_dir, or start anew with --overwrite"
        )


def read_record(folder: str | Path) -> dict[str, Any]:
    """What `run.json` in a folder says: empty where there is none.

    Args:
        folder: The output folder.
    """
    record = Path(folder) / RECORD_NAME
    return json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}


def check_same_data(folder: str | Path, data: Mapping[str, Any]) -> None:
    """Refuse to continue a run with other rows than it began with; the recipe names files, not what is in them.

    Args:
        folder: The output folder.
        data: `rows_fingerprint` of each part.

    Raises:
        OutputFolderError: A part differs; names it.
    """
    record = Path(folder) / RECORD_NAME
    if not record.exists():
        return
    before = json.loads(record.read_text(encoding="utf-8")).get("data", {})
    for name, fingerprint in data.items():
        if name in before and before[name] != json.loads(json.dumps(fingerprint)):
            raise OutputFolderError(
                f"the {name} rows are not those that the run in {folder} began with; bring the file back as it was, "
                f"or start "
                "anew with --overwrite"
            )


def check_same_cache(folder: str | Path, teacher: Mapping[str, Any]) -> None:
    """Refuse to continue a run with another cache than it began with; it may lie elsewhere now.

    Args:
        folder: The output folder.
        teacher: What the teacher says of itself.

    Raises:
        OutputFolderError: The cache holds other bytes.
    """
    record = Path(folder) / RECORD_NAME
    if not record.exists():
        return
    before = json.loads(record.read_text(encoding="utf-8")).get("teacher", {}).get("sha256")
    if before is not None and before != teacher.get("sha256"):
        raise OutputFolderError(
            f"teacher.cache is not the cache that the run in {folder} began with (sha256 {before[:12]}, this one has "
            f"{str(teacher.get('sha256'))[:12]}); bring that one back, or start anew with --overwrite"
        )


def clear_output_folder(folder: str | Path) -> None:
    """Remove what a run left in its folder: checkpoints, records, batches of a step that failed, the baseline, the
    teacher's answers, what transforms found, and weights; other files stay.
    """
    folders = (UNFINISHED, GOLD_BASELINE, "transforms")
    leftovers = [*(Path(folder) / name for name in folders), *Path(folder).glob(f"{BATCHES}*")]
    for path in [*checkpoints(folder), *leftovers]:
        shutil.rmtree(path, ignore_errors=not path.exists())
    for pattern in (*_RUN_FILES, *_WEIGHT_FILES):
        for path in Path(folder).glob(pattern):
            path.unlink()
