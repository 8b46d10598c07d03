"""What stands at the top of a card for the hub to read: base model, licence, data, tags, and results as `model-index`.

Says only what the record says: an id that isn't one of the hub's is left out, and so is a licence that the parts of a
model don't share.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from hfkd.card.fidelity import interval_of
from hfkd.card.licences import HUB_LICENCES
from hfkd.card.markdown import one_line
from hfkd.card.reading import count, number, section, text
from hfkd.card.results import accuracy_of, details_of, other_tasks, shots_of
from hfkd.card.words import base_id, ingredients_of, is_adapter, is_part, short_name, title

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_OWN = ("self", "none", "ema", "snapshot", "early_exit")
_TASK = {"task_type": "text-generation", "task_name": "Text generation"}
_FIDELITY = (
    ("agreement", "token_agreement", "share of tokens with the teacher's likeliest token", "agreement_interval"),
    ("forward_kl", "kl_divergence", "KL(teacher to student), nats per token", "forward_kl_interval"),
    ("reverse_kl", "reverse_kl_divergence", "KL(student to teacher), nats per token", "reverse_kl_interval"),
    ("student.expected_calibration_error", "expected_calibration_error", "expected calibration error", ""),
    ("student.brier", "brier_score", "Brier score (0 to 2)", ""),
    ("student.perplexity", "perplexity", "perplexity", ""),
)


def metadata(run: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """The YAML between the dashes, as `huggingface_hub` writes it."""
    adapter, base = is_adapter(run), base_id(run)
    results = list(_results(run, report))
    kind = text(run, "recipe.teacher.kind").split(":")[0]
    tags = ["hfkd", "knowledge-distillation"] + ([f"{_slug(kind)}-teacher"] if kind else [])
    data = ModelCardData(
        base_model=base or None,
        license=_licence_id(licence(run)),
        datasets=_datasets(run) or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=tags + (["lora"] if adapter else []),
        metrics=["accuracy"] if any(result.metric_type == "accuracy" for result in results) else None,
        model_name=one_line(title(run), 96) if results else None,
        eval_results=results or None,
        **({"base_model_relation": _relation(run)} if base else {}),
        **_named_licence(licence(run)),
    )
    return data.to_yaml().strip()


def _relation(run: Mapping[str, Any]) -> str:
    """What the model is to its base; an adapter of a part of it can't be put on the whole."""
    return "adapter" if is_adapter(run) and not is_part(run) else "finetune"


def licence(run: Mapping[str, Any]) -> str:
    """The licence that student, teacher, training rows and demonstrations all have; empty where one isn't known or
    differs.
    """
    names = {text(one, "licence").strip() for _, one in ingredients_of(run)}
    return names.pop() if len(names) == 1 and _all_known(run) else ""


def _all_known(run: Mapping[str, Any]) -> bool:
    """Whether nothing that the recipe names is without an origin; a teacher that is the student itself needs none."""
    known, teacher = section(run, "origins"), section(run, "recipe.teacher")
    members = section(teacher, "members")
    wanted = {f"teacher.{name}": section(one) for name, one in members.items()} or {"teacher": teacher}
    named = [key for key, one in wanted.items() if text(one, "kind", "unknown") not in _OWN]
    shown = ["demonstrations"] if text(run, "recipe.data.demonstrations.path") else []
    return all(section(known.get(key)) for key in ("student", "train", *shown, *named))


def licence_words(run: Mapping[str, Any]) -> str:
    """The licence, or why none is named."""
    if name := licence(run):
        return f"{name}: that of everything that the model was made of."
    named = [f"{role}: {text(one, 'licence', 'not recorded')}" for role, one in ingredients_of(run)]
    return (
        f"none is named, since what the model was made of doesn't share one that is known ({'; '.join(named)}). The "
        "licences of all of them bear on it."
        if named
        else "none is named: the record doesn't say what the model was made of."
    )


def _licence_id(name: str) -> str | None:
    return (name.lower() if name.lower() in HUB_LICENCES else "other") if name else None


def _named_licence(name: str) -> dict[str, str]:
    return {"license_name": _slug(name)} if name and _licence_id(name) == "other" else {}


def _datasets(run: Mapping[str, Any]) -> list[str]:
    """The data sets of the hub that it was made of: training rows, and what demonstrations are from."""
    return list(dict.fromkeys(name for key in ("train", "demonstrations") if (name := _on_hub(run, key))))


def _on_hub(run: Mapping[str, Any], key: str) -> str:
    """The id of a data set that is known to be on the hub."""
    known = section(run, f"origins.{key}")
    name = text(known, "id")
    return name if text(known, "source") == "hub" and _HUB_ID.fullmatch(name) else ""


def _results(run: Mapping[str, Any], report: Mapping[str, Any]) -> Iterator[EvalResult]:
    """The figures of the model as it is: after training, on its own task, then on others, then beside its teacher."""
    own = _held_out(run)
    yield from _accuracies(details_of(report), own)
    for name, details in other_tasks(report):
        yield from _accuracies(details, _named(name))
    after = section(report, "fidelity.after")
    for key, kind, words, interval in _FIDELITY:
        if (figure := number(after, key)) is not None:
            between = interval_of(after, interval)
            arguments = {"tokens": count(after, "tokens"), **_between(between)}
            yield _result(own, kind, figure, f"{words}{_in_words(between)}", arguments)


def _accuracies(details: Mapping[str, Any], where: Mapping[str, Any]) -> Iterator[EvalResult]:
    for shots in shots_of(details):
        found = accuracy_of(details, "after", shots)
        if found is not None:
            between = (found.low, found.high)
            items = count(section(section(details, "after"), shots), "items")
            arguments = {"num_few_shot": int(shots), "items": items, **_between(between)}
            yield _result(where, "accuracy", found.share, f"{shots}-shot accuracy{_in_words(between)}", arguments)


def _result(where: Mapping[str, Any], kind: str, figure: float, words: str, arguments: dict[str, Any]) -> EvalResult:
    rounded = round(figure, 6)
    return EvalResult(
        **_TASK, **where, metric_type=kind, metric_value=rounded, metric_name=words, metric_args=arguments
    )


def _between(interval: tuple[float, float] | None) -> dict[str, list[float]]:
    return {"interval_95": [round(one, 6) for one in interval]} if interval else {}


def _in_words(interval: tuple[float, float] | None) -> str:
    return f" (95% interval {interval[0]:.4g} to {interval[1]:.4g})" if interval else ""


def _held_out(run: Mapping[str, Any]) -> dict[str, Any]:
    """The evaluation items as `model-index` names a data set; without a path of their own they are held out."""
    path = text(run, "recipe.evaluation.path")
    key, source = ("evaluation", "recipe.evaluation") if path else ("train", "recipe.data.train")
    asked, held_out = section(run, source), "" if path else ", rows held out of training"
    words = one_line(f"{short_name(path or text(asked, 'path')) or 'held-out rows'}{held_out}", 96)
    if not (name := _on_hub(run, key)):
        return {**_named(short_name(path or text(asked, "path"))), "dataset_name": words}
    named = {"dataset_type": name, "dataset_name": words}
    commit = text(run, f"origins.{key}.revision") or text(asked, "revision")
    for field, found in (("config", asked.get("name")), ("split", asked.get("split")), ("revision", commit)):
        if isinstance(found, str) and found.strip():
            named[f"dataset_{field}"] = one_line(found, 96)
    return named


def _named(task: str) -> dict[str, Any]:
    """Rows that no data set of the hub is known to hold, under a name that none has: the hub links what is an id."""
    return {"dataset_type": f"local-{_slug(task)}", "dataset_name": one_line(task, 96)}


def _slug(words: str) -> str:
    """A name in the letters that ids may have."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", words).strip("-.")[:96].lower() or "unnamed"
