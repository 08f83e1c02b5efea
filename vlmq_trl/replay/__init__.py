# SPDX-License-Identifier: Apache-2.0
"""A replay buffer on disk: an offline part that stays, and online episodes that come in and, over capacity, go.

```
folder/
  manifest.json                 what is committed; replaced as a whole by every commit
  lock                          held by the one process that writes
  shards/<first>-<end>.arrow    turns, with the columns and types of `trajectory_features`; written once
  images/ab/<sha256>.png        each distinct picture once; shards name it by its path below the folder
```

A commit writes pictures, then one shard, then the manifest, each flushed to the disk before the next, so that the
folder holds the last commit whole whenever the process is killed (and, on a journalling file system, whenever power
fails). What an interrupted commit leaves behind is removed by the next opening for writing. Small shards are merged
into larger ones on the way (`contents.mergeable`), so that there are not many, however often one commits.

Reading goes through memory-mapped shards. In memory are 22 bytes a turn (16 to 32 more with `Priorities`) and, when
writing, the episodes' ids, a count for each picture, and 64 MB of pictures that may come again.
"""

from .buffer import ReplayBuffer, load_replay, process_folder
from .priorities import Priorities, SumTree

__all__ = ["Priorities", "ReplayBuffer", "SumTree", "load_replay", "process_folder"]
