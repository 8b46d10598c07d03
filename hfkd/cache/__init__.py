"""What a teacher said, on disk: a data set of Parquet shards with a manifest that says what it was made of.

Knows no teacher: whoever writes a cache hands in a function that says something of a batch, and whoever reads it gets
rows. The format and the formulas of the codecs are in `docs/caching.md`.
"""

from __future__ import annotations

from hfkd.cache.codecs import Codec, Hidden, Sampled, TopK, make_codec
from hfkd.cache.contract import text_contract, texts_of
from hfkd.cache.folder import clear_cache
from hfkd.cache.format import CacheError, Manifest, compare, differences, row_key, view_keys
from hfkd.cache.reader import CacheReader, find_faults
from hfkd.cache.writer import CacheWriter, make_plan

__all__ = [
    "CacheError",
    "CacheReader",
    "CacheWriter",
    "Codec",
    "Hidden",
    "Manifest",
    "Sampled",
    "TopK",
    "clear_cache",
    "compare",
    "differences",
    "find_faults",
    "make_codec",
    "make_plan",
    "row_key",
    "text_contract",
    "texts_of",
    "view_keys",
]
