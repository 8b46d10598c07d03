"""Did the student become its teacher? `measure_fidelity` holds the two against each other, token by token."""

from hfkd.eval.fidelity.figures import FidelityReport, measure_fidelity, summarize

__all__ = ["FidelityReport", "measure_fidelity", "summarize"]
