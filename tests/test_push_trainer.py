"""`push_to_hub` of the trainer against a hub in this process: what arrives while it trains and at its end."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from hub_server import Fault, File, Hub, hub_for
from peft import AutoPeftModelForCausalLM
from runs import SECRET, logits
from training import make_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from hfkd.uploads import HubError

EACH_STEP = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "learning_rate": 0.01}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process talks to, with the base of the adapters."""
    with hub_for(tmp_path, monkeypatch) as served:
        make_model(seed=0).save_pretrained(tmp_path / "base-files")
        files = {path.name: File(path.read_bytes(), False) for path in (tmp_path / "base-files").iterdir()}
        served.make("me/base", private=False).commit("weights", files)
        yield served


def trainer_for(folder: Path, **settings: Any) -> Any:
    """A trainer of an adapter on a base of the hub."""
    model = make_model(seed=0)
    model.config._name_or_path = model.name_or_path = "me/base"
    return make_trainer(
        folder, model=model, hub_model_id="me/it", **{"max_steps": 1, "learning_rate": 0.01, **settings}
    )


def clean(hub: Hub) -> None:
    """Nothing that must not be there ever was, in no commit."""
    names = {name for one in hub.repositories.values() for commit in one.commits for name in commit["files"]}
    assert not [name for name in names if name.startswith(("checkpoint", "last-checkpoint", "_"))]
    assert not names & {"training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    assert not names & {".env", "teacher_answers.jsonl", "hfkd.json"} and SECRET.encode() not in hub.everything()


def test_the_end_of_a_training(hub: Hub, tmp_path: Path) -> None:
    """`Trainer` uploads the whole folder, pickles and secrets too, into a repository that is public by default."""
    folder = tmp_path / "out"
    trainer = trainer_for(folder, **EACH_STEP)
    trainer.train()
    for name in (".env", "teacher_answers.jsonl"):
        (folder / name).write_text(SECRET)
    sent = trainer.push_to_hub("Done")
    assert sent.changed and hub.messages("me/it") == ["Done"] and hub.repositories["model", "me/it"].private
    files = hub.files("me/it")
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"} <= set(files)
    clean(hub)
    assert torch.allclose(logits(AutoPeftModelForCausalLM.from_pretrained("me/it")), logits(trainer.model), atol=1e-6)
    assert AutoTokenizer.from_pretrained("me/it").eos_token == "<|im_end|>"
    assert not trainer.push_to_hub("Again").changed and hub.messages("me/it") == ["Done"]
    assert trainer.push_to_hub("Later", blocking=False).result(timeout=60).changed is False


def test_each_checkpoint(hub: Hub, tmp_path: Path) -> None:
    """What is pushed while training goes on is pushed unseen."""
    folder = tmp_path / "out"
    trainer = trainer_for(folder, push_to_hub=True, hub_always_push=True, save_total_limit=1, **EACH_STEP)
    assert hub.repositories["model", "me/it"].private
    trainer.train()
    assert hub.messages("me/it") == ["Training in progress, step 1", "Training in progress, step 2"]
    clean(hub)
    loaded = AutoPeftModelForCausalLM.from_pretrained("me/it")
    assert torch.allclose(logits(loaded), logits(trainer.model), atol=1e-6)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2"], "something is left behind"
    trainer.save_model()
    assert hub.messages("me/it")[-1] == "Model save" and "README.md" in hub.files("me/it")


def test_a_whole_model(hub: Hub, tmp_path: Path) -> None:
    """A student without an adapter goes the same way."""
    trainer = make_trainer(
        tmp_path / "out", teacher=None, objective="cross_entropy", hub_model_id="whole", max_steps=1
    )
    trainer.train()
    trainer.push_to_hub(private=False)
    assert not hub.repositories["model", "me/whole"].private
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained("me/whole")), logits(trainer.model), atol=1e-6)


def test_a_card_that_is_there_stays(hub: Hub, tmp_path: Path) -> None:
    """A card that a person wrote, or a run, is worth more than what Trainer makes of its settings."""
    folder = tmp_path / "out"
    trainer = trainer_for(folder)
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    trainer.push_to_hub()
    assert hub.files("me/it")["README.md"] == b"---\nlicense: mit\n---\n\n# Mine\n"


def test_a_card_that_was_completed_on_the_hub_stays(hub: Hub, tmp_path: Path) -> None:
    """Trainer's card asks to be completed, and people do that in the hub's editor."""
    trainer = trainer_for(tmp_path / "out")
    trainer.push_to_hub()
    there = hub.repositories["model", "me/it"]
    assert b"generated automatically" in hub.files("me/it")["README.md"]
    words = b"---\nlibrary_name: peft\n---\n\n# Completed\n"
    there.commit("by hand", {**there.at()["files"], "README.md": File(words, False)})
    (tmp_path / "out" / "README.md").unlink()
    trainer.push_to_hub()
    assert hub.files("me/it")["README.md"] == words


def test_a_tracker_publishes_nothing_before_the_push_is_right(hub: Hub, tmp_path: Path) -> None:
    """Trackio puts its page out at this call: it was there, for all, while the push itself was refused."""
    seen: list[bool] = []

    class Tracker(TrainerCallback):
        def on_push_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
            seen.append(args.hub_private_repo)

    trainer = make_trainer(
        tmp_path / "out", model=make_model(seed=0), hub_model_id="me/zz", max_steps=1, callbacks=[Tracker()]
    )
    with pytest.raises(ValueError, match="a model without a name"):
        trainer.push_to_hub()
    assert not seen
    trainer_for(tmp_path / "named", callbacks=[Tracker()]).push_to_hub()
    assert seen == [True]


def test_a_push_that_fails_ends_no_training(hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A night of training lost to the network; or a push that failed in silence."""
    trainer = trainer_for(tmp_path / "out", push_to_hub=True, **EACH_STEP)
    hub.faults = [Fault("POST", "commit", 403, times=1000)]
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 2
    assert any("wasn't uploaded; training goes on" in one.getMessage() for one in caplog.records)
    with pytest.raises(HubError, match="403"):
        trainer.push_to_hub()
    hub.faults = []
    trainer.push_to_hub()
    assert "adapter_model.safetensors" in hub.files("me/it")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hub_strategy": "checkpoint"}, "would upload the optimizer's state"),
        ({"hub_model_id": "me/open"}, "is public.*Set hub_private_repo=False"),
        ({"hub_model_id": "me/a b"}, "Expected owner/name"),
        ({"model": "unnamed"}, "belongs on a model without a name"),
    ],
)
def test_what_can_be_known_is_told_before_training(hub: Hub, tmp_path: Path, settings: dict, words: str) -> None:
    """The first push comes after the first checkpoint, which may be hours."""
    hub.make("me/open", private=False)
    model = make_model(seed=0)
    if settings.get("model") != "unnamed":
        model.config._name_or_path = model.name_or_path = "me/base"
    settings = {"hub_model_id": "me/it", **settings, "model": model}
    with pytest.raises(ValueError, match=words):
        make_trainer(tmp_path / "out", push_to_hub=True, **settings)


def test_hub_private_repo_is_what_counts(hub: Hub, tmp_path: Path) -> None:
    """Told otherwise is told otherwise."""
    hub.make("me/it", private=False)
    trainer_for(tmp_path / "out", push_to_hub=True, hub_private_repo=False).push_to_hub()
    assert "adapter_model.safetensors" in hub.files("me/it")
