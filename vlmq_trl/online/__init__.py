# SPDX-License-Identifier: Apache-2.0
"""Online data for a trainer: when to collect, with which policy, into which buffer, and what a batch draws from it.

Rounds of collection alternate with updates. Everything that decides what is collected and drawn is a function of the
seed, the number of the update and what the replay buffer holds, so that a resumed run needs no state of its own (but
the priorities, where batches are drawn by them): it finds the rounds that are due in the buffer, and collects those
that are not.

Contents: `schedule`; `data`, of one process or of one of several; `asynchronous`, which collects in a thread while the
model learns; `opening`, what is checked and opened before any of it.
"""

from .asynchronous import AsyncOnlineData
from .data import OnlineData
from .opening import check_online, open_online, replay_folder
from .schedule import Schedule

__all__ = ["AsyncOnlineData", "OnlineData", "Schedule", "check_online", "open_online", "replay_folder"]
