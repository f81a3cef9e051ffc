"""Load that came past the gateway: requests of other clients, drawn and played along with those of the log.

Nobody has recorded them. So a stream of as many as explain the times to the first token is drawn: at random times since
the change, with the lengths of the server's own answers. Twice as many are drawn, of which every draw of what is not
known has another half. Policies meet them as they meet each other's.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from jaxroute.evaluation.twin.recorded import Recorded
from jaxroute.evaluation.twin.simulate import Played

RATES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""What is tried, in terms of the server's own requests per second since the change."""


class Stream(NamedTuple):
    """Requests of other clients at one server."""

    server: int
    since: float
    """s of the log."""
    rate: float
    """1/s."""


class Joined(NamedTuple):
    """A log together with others' requests."""

    recorded: Recorded
    lengths: Int[np.ndarray, "draw request server"]
    own: Bool[np.ndarray, "request"]
    """Which are the log's."""
    place: Int[np.ndarray, "request"]
    """Of each in what it was made from: the log, and then those of others."""
    forced: Int[np.ndarray, "draw request"]
    """The server of others' requests, and N for those that a draw does without; -1 for the log's."""

    def own_part(self, played: Played) -> Played:
        """Return what came of the log's own requests; the accelerator time between two of them is the first one's."""
        kept = {name: value[:, self.own] for name, value in played._asdict().items()}
        # The first request is the log's: others come after the first part.
        busy = np.add.reduceat(played.busy_seconds, np.flatnonzero(self.own), axis=1)
        return played._replace(**kept | {"busy_seconds": busy})


def join(
    recorded: Recorded, lengths: Int[np.ndarray, "draw request server"], streams: list[Stream], seed: int
) -> Joined:
    """Draw others' requests, and put them among the log's."""
    rng = np.random.default_rng(seed)
    number = len(recorded.arrival)
    like, times, servers = [], [], []
    for stream in streams:
        answers = np.flatnonzero(recorded.choice == stream.server)
        span = float(recorded.arrival[-1]) - stream.since
        count = int(rng.poisson(2 * stream.rate * span))
        times.append(rng.uniform(stream.since, recorded.arrival[-1], count))
        like.append(rng.choice(answers, count))
        servers.append(np.full(count, stream.server))
    source = np.concatenate([np.arange(number), *like]).astype(int)
    arrival = np.concatenate([recorded.arrival, *times])
    order = np.argsort(arrival, kind="stable")
    source, arrival = source[order], arrival[order]
    forced = np.concatenate([np.full(number, -1), *servers]).astype(int)[order]

    there = rng.random((len(lengths), len(forced))) < 0.5
    of_draw = np.where((forced >= 0) & ~there, len(recorded.servers), forced)
    joined = recorded.part(source)._replace(arrival=arrival, shadow={})
    return Joined(joined, lengths[:, source], order < number, order, of_draw)
