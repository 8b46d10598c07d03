"""What of a run may leave this machine, and how it is sent: by an allow-list, gone over, in one commit.

Knows neither trainer nor recipe: a folder in, the files of a repository of the hub out.
"""

from hfkd.uploads.base import (
    ADAPTER_CONFIG,
    BASE,
    Base,
    adapter_config_for,
    base_target,
    find_base,
    is_on_hub,
    no_base,
    read_adapter_config,
)
from hfkd.uploads.contents import masked_text
from hfkd.uploads.files import INDEX, RUN, TOKENIZER, WEIGHTS, Upload, collect, owned_by
from hfkd.uploads.repositories import Sent, Target
from hfkd.uploads.sending import check, create_missing, send
from hfkd.uploads.words import HubError, check_repo_id

__all__ = [
    "ADAPTER_CONFIG",
    "BASE",
    "INDEX",
    "RUN",
    "TOKENIZER",
    "WEIGHTS",
    "Base",
    "HubError",
    "Sent",
    "Target",
    "Upload",
    "adapter_config_for",
    "base_target",
    "check",
    "check_repo_id",
    "collect",
    "create_missing",
    "find_base",
    "is_on_hub",
    "masked_text",
    "no_base",
    "owned_by",
    "read_adapter_config",
    "send",
]
