"""The feature cache: a Zarr v3 group that holds every layer's pooled output for one dataset.

schema    what the arrays and attributes are          layout      names of its files, by version of the format
writer    one process's hold on a cache               reader      features, means and labels out of it
status    which clips are done; `status_log` keeps it from version 2 on
shards    the bytes of one shard file                 store       where files lie: a folder or a bucket
verify    what is damaged; `mend` and `metadata` restore columns and metadata
changes   how a dataset differs from a cache; `rebuild` lets the cache follow it
derive    caches of caches (`merge`, `select`), by `gather`; `copying` moves one
"""

from whisper_at_cli.extract.cache.reader import FeatureCache
from whisper_at_cli.extract.cache.schema import CacheSpec, ClipTable, Status
from whisper_at_cli.extract.cache.writer import CacheWriter, ShardBlock

__all__ = ["CacheSpec", "CacheWriter", "ClipTable", "FeatureCache", "ShardBlock", "Status"]
