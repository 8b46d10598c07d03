"""One model that writes as several: each adapter behind prompts of the style that it was trained with.

It knows adapters by their names and styles; which of them plays which role is said when they are asked.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hfkd.adapters.loading import adapter_names, check_names, using
from hfkd.adapters.loop import Outcome, consistency_loop
from hfkd.adapters.rows import deep_question
from hfkd.data.prompts import PromptBuilder, PromptStyle
from hfkd.rollout.base import GenerationSettings
from hfkd.rollout.hf import HFRollout

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


class Reasoners:
    """Writes with one adapter or another.

    What is sampled is a function of the settings' seed, of the adapter's name, of the round and of the prompt, so a
    question has the same outcome whichever others are asked with it.

    Args:
        model: From `load_adapters`, where it is to run.
        tokenizer: Of the base.
        styles: By the adapter's name, how its prompts are written; those without one are written in the default style.
        settings: How texts are drawn. Their stop strings aren't used: each style has its own.

    Attributes:
        written: How many texts were written so far.
        cut: How many of them reached the limit of tokens before they ended: a number at their end may lack digits.

    Raises:
        ValueError: A style is for an adapter that isn't there.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        styles: Mapping[str, PromptStyle],
        settings: GenerationSettings,
    ) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.names = adapter_names(model)
        self.written = self.cut = 0
        for name in styles:
            check_names({"styles": name}, self.names)
        self._builders = {name: PromptBuilder(tokenizer, styles.get(name)) for name in self.names}

    def write(self, name: str, questions: Sequence[str], number: int = 1) -> list[str]:
        """Have one adapter write behind questions.

        Args:
            name: Of the adapter.
            questions: Not formatted yet.
            number: The round; another one draws other texts.

        Returns:
            A text for each, without spaces around it.

        Raises:
            ValueError: There is no such adapter, or a prompt is too long for the model.
        """
        check_names({"adapter": name}, self.names)
        if not questions:
            return []
        builder, rows = self._builders[name], [{"prompt": question} for question in questions]
        stop = builder.style.stop if isinstance(builder.prompt(rows[0]), str) else ()
        rollout = HFRollout(self.tokenizer, replace(self.settings, stop=tuple(stop)))
        prompts = [builder.encode_prompt(row) for row in rows]
        with using(self.model, name), rollout.at_step(number, seed=zlib.crc32(name.encode())):
            completions = rollout.generate(self.model, prompts)
        self.written += len(completions)
        self.cut += sum(not completion.finished for completion in completions)
        return [completion.text.strip() for completion in completions]

    def agree(
        self,
        questions: Sequence[str],
        *,
        intuitive: str = "intuitive",
        knowledge: str = "knowledge",
        deep: str = "deep",
        max_rounds: int = 20,
        **options: Any,
    ) -> list[Outcome]:
        """Ask questions until two ways agree, see `hfkd.adapters.loop.consistency_loop`.

        Args:
            questions: Not formatted yet.
            intuitive: The adapter that answers at once.
            knowledge: The adapter that writes the rules that a question needs.
            deep: The adapter that answers with these rules before it.
            max_rounds: At most so many.
            options: Of `consistency_loop`.

        Raises:
            ValueError: There is no such adapter; or the rounds would all be the same, since nothing is sampled.
        """
        check_names({"intuitive": intuitive, "knowledge": knowledge, "deep": deep}, self.names)
        if self.settings.temperature == 0 and max_rounds > 1:
            raise ValueError(
                f"temperature is 0 and max_rounds is {max_rounds}: every round would write the same texts; sample "
                "(temperature above 0), or ask for 1 round"
            )
        return consistency_loop(
            questions,
            lambda asked, number: self.write(intuitive, asked, number),
            lambda asked, number: self.write(knowledge, asked, number),
            lambda asked, rules, number: self.write(deep, list(map(deep_question, asked, rules)), number),
            max_rounds,
            **options,
        )
