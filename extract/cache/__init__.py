"""The feature cache: a Zarr v3 group that holds every layer's pooled output for one dataset.

schema  what the arrays and attributes are        shards  the bytes of one shard file
writer  one process's hold on a cache             reader  features, means and labels out of it
store   where its files lie: a folder or a bucket
"""

from whisper_at_cli.extract.cache.reader import FeatureCache
from whisper_at_cli.extract.cache.schema import CacheSpec, ClipTable, Status
from whisper_at_cli.extract.cache.writer import CacheWriter, ShardBlock

__all__ = ["CacheSpec", "CacheWriter", "ClipTable", "FeatureCache", "ShardBlock", "Status"]
