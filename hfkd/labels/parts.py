"""The template and the filters of a plan, by key or by `package.module:Class`, made with their arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hfkd.labels.extraction import ExtractionTemplate
from hfkd.labels.filters import FILTERS, Filter
from hfkd.labels.plan import LabelPlan
from hfkd.labels.templates import LabelTemplate, RationaleTemplate, Template
from hfkd.named import import_class
from hfkd.recipe.schema import PartSection
from hfkd.recipe.source import near, shown
from hfkd.recipe.values import argument_faults

TEMPLATES: dict[str, type[Template]] = {
    "label": LabelTemplate,
    "rationale": RationaleTemplate,
    "extraction": ExtractionTemplate,
}
"""The templates by the keys that plans use."""


def make_template(plan: LabelPlan) -> Template:
    """The template of a plan.

    Raises:
        ValueError: There is no such class, or it refuses its arguments (so does the next one); or rows of several of
            its answers would contradict each other, and all are to be kept.
    """
    template: Template = _make("template", plan.template, TEMPLATES, Template)
    if plan.keep == "all" and not template.together:
        raise ValueError(
            f"keep: got all with the template {plan.template.kind}, whose samples would contradict each other in "
            "rows of one passage; expected keep: first"
        )
    return template


def make_filters(plan: LabelPlan) -> list[tuple[str, Filter]]:
    """The filters of a plan in their order, each with its key."""
    return [(one.kind, _make(f"filters.{n}", one, FILTERS, Filter)) for n, one in enumerate(plan.filters)]


def _make(key: str, section: PartSection, known: Mapping[str, type], base: type) -> Any:
    kind, given = section.kind, dict(section.model_extra or {})
    if kind not in known and ":" not in kind:
        raise ValueError(
            f"{key}.kind: got {shown(kind)}; expected {', '.join(known)}, or package.module:Class{near(kind, known)}"
        )
    cls = known[kind] if kind in known else import_class(kind, f"{key}.kind", base)
    if faults := list(argument_faults(key, cls, given)):
        raise ValueError("; ".join(faults))
    try:
        return cls(**given)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{key}: {error}") from error
