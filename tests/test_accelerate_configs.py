"""The launch configurations: accelerate's own loader reads each, and the processes get the plugin that it promises."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "recipes" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))
KINDS = {
    "one_gpu": DistributedType.NO,
    "ddp": DistributedType.MULTI_GPU,
    "cpu_two": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "multi_node": DistributedType.FSDP,
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
}


def arguments(file: Path, *more: str) -> argparse.Namespace:
    """What `accelerate launch` makes of a file, up to where it would start processes."""
    parsed = launch_command_parser().parse_args(
        ["--config_file", str(file), *more, "scripts/distill.py", "recipe.yaml"]
    )
    args, defaults, _ = _validate_launch_command(parsed)
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    return args


def environment(file: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> argparse.Namespace:
    """Set what the launcher would give to each process; returns the launcher's arguments."""
    args = arguments(file, "--main_process_port", "0", *more)
    prepare = prepare_multi_gpu_env
    if args.use_deepspeed:
        prepare = lambda given: prepare_deepspeed_cmd_env(given)[1]  # noqa: E731
    elif not (args.use_fsdp or args.multi_gpu):
        prepare = lambda given: prepare_simple_launcher_cmd_env(given)[1]  # noqa: E731
    for key, value in prepare(args).items():
        monkeypatch.setenv(key, value)
    return args


def test_there_is_one_for_each_way() -> None:
    """A way to launch that the pages promise must have its file, and a file its line in the table."""
    assert {file.stem for file in FILES} == set(KINDS)
    for page in (FOLDER / "README.md", ROOT / "docs" / "scaling.md"):
        missing = [file.name for file in FILES if file.name not in page.read_text("utf-8")]
        assert not missing, (page, missing)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_reads_it(file: Path) -> None:
    """Accelerate's loader refuses unknown keys at the top; a typo in the sections would be passed over in silence."""
    config = load_config_from_file(str(file))
    assert config.distributed_type == KINDS[file.stem]
    known = {action.dest for action in launch_command_parser()._actions}
    for section in ("fsdp_config", "deepspeed_config"):
        assert set(getattr(config, section)) <= known, section
    assert config.mixed_precision == "no", "the recipe chooses the types"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_its_command_is_the_one_that_starts_it(file: Path) -> None:
    """The command in a file's head is copied by whoever opens it; the script and the file must exist."""
    head = " ".join(re.findall(r"^#(.*)$", file.read_text("utf-8"), re.MULTILINE))
    assert f"--config_file recipes/accelerate/{file.name}" in head and "scripts/distill.py RECIPE" in head
    assert (ROOT / "scripts" / "distill.py").exists()


@pytest.mark.parametrize("name", ["fsdp2", "multi_node"])
def test_fsdp2(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that Accelerate doesn't read leaves FSDP1, whole layers or no checkpointing, without a word."""
    more = ["--machine_rank", "1"] if name == "multi_node" else []
    args = environment(FOLDER / f"{name}.yaml", monkeypatch, *more)
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.activation_checkpointing is True and plugin.cpu_ram_efficient_loading is False
    assert "FULL_STATE_DICT" in str(plugin.state_dict_type)
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert type(plugin.cpu_offload).__name__ == "OffloadPolicy", "none, that is; CPUOffloadPolicy would offload"
    assert args.num_processes // args.num_machines == 8


def test_several_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each machine must be told its own number and the first one's address, and start its part of the processes."""
    given = ["--machine_rank", "1", "--main_process_ip", "10.0.0.1", "--num_machines", "8", "--num_processes", "64"]
    args = environment(FOLDER / "multi_node.yaml", monkeypatch, *given)
    assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("8", "8", 1)
    assert "10.0.0.1" in (getattr(args, "rdzv_endpoint", "") or args.master_addr)


@pytest.mark.parametrize(("name", "stage"), [("zero2", 2), ("zero3", 3)])
def test_zero(name: str, stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the recipe decides (accumulation, clipping, batch) must stay open for the Trainer, or it stops at a
    difference; and ZeRO-3 saves no model unless it's told to gather it.
    """
    environment(FOLDER / f"{name}.yaml", monkeypatch)
    assert os.environ["ACCELERATE_USE_DEEPSPEED"] == "true"
    plugin = DeepSpeedPlugin()
    config = plugin.deepspeed_config
    assert plugin.zero_stage == config["zero_optimization"]["stage"] == stage
    assert config["gradient_accumulation_steps"] == config["gradient_clipping"] == "auto"
    assert config["train_micro_batch_size_per_gpu"] == "auto"
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "none"
    assert plugin.zero3_init_flag is False
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is (stage == 3)


@pytest.mark.parametrize("name", ["one_gpu", "ddp"])
def test_without_shards(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain ways must ask for no sharding."""
    args = environment(FOLDER / f"{name}.yaml", monkeypatch)
    assert not args.use_fsdp and not args.use_deepspeed and not args.cpu
    assert args.num_processes == (1 if name == "one_gpu" else 2)


def test_the_files_for_several_gpus_say_the_same_of_fsdp() -> None:
    """Two files for one way drift apart unless they're held together."""
    sections = [
        yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["fsdp_config"] for name in ("fsdp2", "multi_node")
    ]
    assert sections[0] == sections[1]


SCRIPT = """
import json, sys
import torch
from hfkd import DistillationConfig
args = DistillationConfig(output_dir=sys.argv[1])
state = args.distributed_state
total = torch.ones(())
torch.distributed.all_reduce(total)
result = {"processes": state.num_processes, "kind": state.distributed_type.value, "device": args.device.type,
          "backend": torch.distributed.get_backend(), "sum": float(total)}
if state.is_main_process:
    open(sys.argv[1] + "/found.json", "w").write(json.dumps(result))
torch.distributed.destroy_process_group()
"""


@pytest.mark.dist
def test_two_processes_without_a_gpu(tmp_path: Path) -> None:
    """With accelerate's own flags for CPUs a single process starts, and nothing that has to do with two is tried."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / "cpu_two.yaml")]
    settings = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--main_process_port", "0", str(tmp_path / "script.py"), str(tmp_path)],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = yaml.safe_load((tmp_path / "found.json").read_text())
    assert found == {"processes": 2, "kind": "MULTI_CPU", "device": "cpu", "backend": "gloo", "sum": 2.0}
