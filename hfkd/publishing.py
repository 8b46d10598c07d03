"""`PublishingTrainer`: what of a `Trainer`'s folder goes to the hub, and how.

`Trainer` uploads all that lies in the folder but checkpoints. This one uploads what is on a list, in one commit, into
a private repository; never an optimizer's state, never a pickle of the settings, never rows of data.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress
from transformers.utils.hub import hf_api

from hfkd.uploads import (
    ADAPTER_CONFIG,
    RUN,
    TOKENIZER,
    WEIGHTS,
    Sent,
    Target,
    collect,
    create_missing,
    is_on_hub,
    no_base,
    read_adapter_config,
    send,
)

logger = logging.getLogger(__name__)

_STAGED = "_push-"
_CARD = "README.md"
_DRAFT = "[More Information Needed]"  # what peft writes into the page that goes with each adapter
_HOW = "Set hub_private_repo=False (hub.private: false in a recipe)"
_SENDS_STATES = (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)


class PublishingTrainer(Trainer):
    """A `Trainer` that uploads weights, tokenizer and card, and nothing else; where it isn't told otherwise, into a
    private repository.

    Raises:
        ValueError: With `push_to_hub`: `hub_strategy` would send optimizer states, the base of the adapter isn't on
            the hub, the repository is public and `hub_private_repo` isn't False, or its name can't be one.
        OSError: The hub refuses, or can't be reached.
    """

    _pushing = False
    _is_private = True

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository if it isn't there, after a look at whether a push into it could be right.

        Args:
            token: None takes that of HF_TOKEN or of `hf auth login`.
            private: Whether a new one is private; None takes `hub_private_repo`; if that isn't set, it is.
        """
        if not self.is_world_process_zero():
            return
        if self.args.hub_strategy in _SENDS_STATES:
            raise ValueError(
                f"hub_strategy is {self.args.hub_strategy.value!r}, which would upload the optimizer's state; "
                "expected end or every_save."
            )
        self._check_base()
        chosen = [one for one in (private, self.args.hub_private_repo) if one is not None]
        self._is_private = chosen[0] if chosen else True
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        self.hub_model_id = create_missing(name, private=self._is_private, token=token, say=logger.warning, how=_HOW)
        self.push_in_progress = None

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Sent | Future | None:
        """Save the model and upload it with its tokenizer, its card and what a run says of itself.

        A `README.md` that is there stays as it is, unless it is the empty draft that peft writes.

        Args:
            commit_message: Of the commit.
            blocking: Wait until it is done; otherwise a future is returned.
            token: As for `init_hf_repo`.
            revision: A branch; None takes `hub_revision`.
            private: As for `init_hf_repo`.
            kwargs: Of `create_model_card`, where there is no card.

        Returns:
            Where it is now; None on all processes but the first.
        """
        if self._pushing:  # `save_model` pushes what it saved
            return None
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        elif private is not None:
            self._is_private = private
        folder = Path(self.args.output_dir)
        page = _own_page(folder)
        self._pushing = True
        try:
            self.save_model()
        finally:
            self._pushing = False
        if not self.is_world_process_zero():
            return None
        if page is None:
            self.create_model_card(model_name=kwargs.pop("model_name", self.hub_model_id.split("/")[-1]), **kwargs)
        else:
            (folder / _CARD).write_bytes(page)  # peft writes into any page that it finds
        self._finish_current_push()
        job = functools.partial(self._send, folder, (*WEIGHTS, *TOKENIZER, *RUN), commit_message, token, revision)
        return job() if blocking else hf_api().run_as_future(job)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload the weights and the tokenizer of a checkpoint while training goes on; a push that fails is logged."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        under_way = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if under_way and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        staged = _stage(Path(checkpoint_folder), Path(self.args.output_dir), keep=under_way)
        message = f"Training in progress, step {self.state.global_step}"
        job = hf_api().run_as_future(self._send_staged, staged, message)
        jobs = self.push_in_progress.jobs if under_way else []
        self.push_in_progress = PushInProgress([*jobs, job])

    def _send_staged(self, staged: Path, message: str) -> None:
        try:
            self._send(staged, (*WEIGHTS, *TOKENIZER), message)
        except Exception as error:
            logger.warning("%s wasn't uploaded; training goes on. %s", message, error)
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _send(
        self,
        folder: Path,
        patterns: tuple[str, ...],
        message: str | None,
        token: str | None = None,
        revision: str | None = None,
    ) -> Sent:
        uploads = collect(folder, patterns)
        if any(one.path == ADAPTER_CONFIG for one in uploads):
            _check_on_hub(read_adapter_config(folder).get("base_model_name_or_path"))
        if not any(one.path.endswith(".safetensors") for one in uploads):
            raise ValueError(f"{folder} holds no weights, so nothing was uploaded; save the model first.")
        target = Target(self.hub_model_id, uploads, owned=WEIGHTS)
        revision = revision or self.args.hub_revision
        return send([target], private=self._is_private, token=token, revision=revision, message=message, how=_HOW)[0]

    def _check_base(self) -> None:
        """Refuse an adapter that nobody else could load, before hours are spent on it."""
        model = self.accelerator.unwrap_model(self.model)
        for config in (getattr(model, "peft_config", None) or {}).values():
            _check_on_hub(config.base_model_name_or_path)


def _check_on_hub(base: str | None) -> None:
    if not is_on_hub(base, {}):
        raise ValueError(no_base(base))


def _own_page(folder: Path) -> bytes | None:
    """The card in a folder; None where there is none, or an empty draft."""
    page = folder / _CARD
    content = page.read_bytes() if page.is_file() else None
    return None if content is None or _DRAFT.encode() in content else content


def _stage(checkpoint: Path, folder: Path, keep: bool) -> Path:
    """Put what will be uploaded of a checkpoint aside: it may be deleted, by number, before the upload is done."""
    if not keep:
        for old in folder.glob(f"{_STAGED}*"):
            shutil.rmtree(old, ignore_errors=True)
    staged = folder / f"{_STAGED}{checkpoint.name}"
    shutil.rmtree(staged, ignore_errors=True)
    for pattern in (*WEIGHTS, *TOKENIZER):
        for path in checkpoint.glob(pattern):
            copy = staged / path.relative_to(checkpoint)
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, copy)
            except OSError:  # the disk knows no links
                shutil.copy(path, copy)
    return staged
