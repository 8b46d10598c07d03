"""Sends what a run left to the hub: weights, tokenizer, card, records and pictures, and its cache as a data set.

Nothing is uploaded that isn't on the list in `hfkd.uploads`, and nothing before all of it has been gone over.
"""

from hfkd.hub.caches import check_cache_push, dataset_card, push_cache
from hfkd.hub.pushing import Push, check_push, plan_push, push
from hfkd.uploads import HubError, Sent, Target, Upload, check_repo_id

__all__ = [
    "HubError",
    "Push",
    "Sent",
    "Target",
    "Upload",
    "check_cache_push",
    "check_push",
    "check_repo_id",
    "dataset_card",
    "plan_push",
    "push",
    "push_cache",
]
