"""Windows of a long serving log: each is replayed by itself, from the state in which the log shows the server."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxroute.fitting.logs import ServingLog
from jaxroute.serving.engine import SiteState, idle_site, under_way

# Requests of a window, at the least and in multiples of the most that decode at once: a window may end in the middle of
# so many answers, which tell nothing. Together, windows have at most so many requests.
_WINDOW, _PER_DECODING = 1024, 4
_MOST_REPLAYED = 2048


class Window(NamedTuple):
    """Requests of a log that are replayed by themselves."""

    begin: float
    """When the replay begins, on the log's clock, s."""
    running: Int[np.ndarray, "running"]
    """Requests that decode then, the one that began first first."""
    requests: Int[np.ndarray, "request"]
    """Those that follow, waiting ones included, in order of arrival."""
    compared: Bool[np.ndarray, "request"]
    """Whose measured times are compared to the replay's."""

    def part(self, log: ServingLog) -> tuple[ServingLog, Bool[np.ndarray, "request"]]:
        """Return all requests of the window as a log of its own, and which of them are compared."""
        chosen = np.concatenate([self.running, self.requests])
        compared = np.concatenate([np.zeros(len(self.running), bool), self.compared])
        order = np.argsort(chosen)
        return ServingLog(*(column[chosen[order]] for column in log)), compared[order]

    def gaps(self, log: ServingLog) -> Float[np.ndarray, "request"]:
        """Time from one arrival to the next, the first from `begin`, s; below 0 for a request that waits then."""
        return np.diff(log.arrival_time[self.requests], prepend=self.begin).astype(np.float32)

    def server(self, log: ServingLog, num_lanes: int, num_slots: int, max_num_seqs: int) -> SiteState:
        """Return the server at `begin`, the same in each lane, with what the log says of its running requests.

        A log tells when the first and the last token came; those between are taken to have come evenly.
        """
        state = idle_site(num_lanes, num_slots)
        number = len(self.running)
        if not number:
            return state
        prompt, output = log.prompt_tokens[self.running], log.output_tokens[self.running]
        generated = 1 + np.floor(progress(log, self.running, np.array([self.begin]))[:, 0] * (output - 1))
        generated = np.clip(generated, 1, np.maximum(output - 1, 1))
        # More than the server takes at once have been preempted: they begin anew, as the first of the queue.
        return under_way(
            state,
            request=np.full(number, len(self.requests)),
            prompt_tokens=prompt,
            output_tokens=np.maximum(output, generated + 1),
            generated=generated,
            arrival=log.arrival_time[self.running] - self.begin,
            num_running=min(number, max_num_seqs),
        )


def whole(log: ServingLog, num_fitted: int) -> Window:
    """Return all of the log as one window, of which the first `num_fitted` requests are compared."""
    everything = np.arange(len(log.arrival_time))
    return Window(float(log.arrival_time[0]), np.zeros(0, int), everything, everything < num_fitted)


def choose_windows(log: ServingLog, num_fitted: int) -> list[Window]:
    """Choose windows of one length among the first `num_fitted` requests: all of a short log, parts of a long one.

    The first window begins with an idle server, and its replay is exact. Each other one begins at the calmest moment of
    its stretch of the log, and only requests are compared that arrive after those running at that moment have ended. A
    stretch that always has more prompt tokens waiting than the longest prompt has no window: a log does not tell which
    of its requests were preempted.
    """
    length = max(_WINDOW, 1 << (_PER_DECODING * most_decoding(log) - 1).bit_length())
    if len(log.arrival_time) <= length:
        return [whole(log, num_fitted)]
    first, last = log.first_token_time, log.last_token_time
    # At a first token an iteration has just ended.
    moments = np.sort(first[:num_fitted])
    in_flight = np.searchsorted(log.arrival_time, moments, side="right") - np.searchsorted(np.sort(last), moments)
    number = max(1, min(_MOST_REPLAYED, num_fitted) // length)
    windows = [_window(log, float(log.arrival_time[0]), length, num_fitted)]
    for stretch in np.array_split(np.arange(max(num_fitted - length, 1)), number)[1:]:
        begin = float(moments[stretch[in_flight[stretch].argmin()]])
        waits = (log.arrival_time <= begin) & (first > begin)
        if log.prompt_tokens[waits].sum() <= log.prompt_tokens.max():
            windows.append(_window(log, begin, length, num_fitted))
    # Of one length, so that they share a program.
    length = min(len(window.requests) for window in windows)
    return [window._replace(requests=window.requests[:length], compared=window.compared[:length]) for window in windows]


def _window(log: ServingLog, begin: float, length: int, num_fitted: int) -> Window:
    first, last = log.first_token_time, log.last_token_time
    requests = np.flatnonzero(first > begin)[:length]
    running = np.flatnonzero((first <= begin) & (begin < last))
    running = running[np.argsort(first[running], kind="stable")]
    settled = last[running].max(initial=begin)
    # What comes after the window would slow down whoever answers longer.
    compared = (requests < num_fitted) & (last[requests] <= first[requests[-1]])
    return Window(begin, running, requests, compared & (log.arrival_time[requests] >= settled))


def met_no_queue(log: ServingLog) -> Bool[np.ndarray, "request"]:
    """Tell who was served while never more prompt tokens waited than the longest prompt has."""
    times = np.concatenate([log.arrival_time, log.first_token_time])
    order = np.argsort(times, kind="stable")
    waiting = np.cumsum(np.concatenate([log.prompt_tokens, -log.prompt_tokens])[order])
    queued = np.concatenate([[0], np.cumsum(waiting > log.prompt_tokens.max())])
    begin = np.searchsorted(times[order], log.arrival_time)
    end = np.searchsorted(times[order], log.last_token_time, side="right")
    return queued[begin] == queued[end]


def most_decoding(log: ServingLog) -> int:
    """Count the requests that decode at once, at the most."""
    begin, end = np.sort(log.first_token_time), np.sort(log.last_token_time)
    return int((np.arange(1, len(begin) + 1) - np.searchsorted(end, begin, side="right")).max())


def progress(
    log: ServingLog, requests: Int[np.ndarray, "request"] | slice, times: Float[np.ndarray, "time"]
) -> Float[np.ndarray, "request time"]:
    """Share of each answer that existed at each time, had its tokens come evenly."""
    first, last = log.first_token_time[requests, None], log.last_token_time[requests, None]
    return np.clip((times - first) / np.maximum(last - first, 1e-9), 0, 1)
