"""Looking at what was learned: answers read out of texts, k-shot accuracy, and the report of a run."""
