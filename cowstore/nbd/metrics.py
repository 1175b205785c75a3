"""Metrics: what the server has done, counted by each connection on its own and added up when somebody asks."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from .wire import Command

LATENCIES = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
"""Upper bounds of the latency histogram, in seconds; what took longer is counted behind the last."""
_KINDS = [command.name.lower() for command in Command]


@dataclass
class Counters:
    """What one thread has counted; only that thread changes it.

    Attributes:
        requests: By command.
        errors: Requests that were answered with an error.
        read_bytes: Sent for READ, holes included.
        written_bytes: Taken by WRITE.
        latencies: Requests by latency, one number for each of LATENCIES and one for the rest.
        seconds: Of all of them together.
    """

    requests: list[int] = field(default_factory=lambda: [0] * len(_KINDS))
    errors: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    latencies: list[int] = field(default_factory=lambda: [0] * (len(LATENCIES) + 1))
    seconds: float = 0.0

    def copy(self) -> Counters:
        """What was counted until now."""
        return replace(self, requests=self.requests[:], latencies=self.latencies[:])

    def restore(self, before: Counters) -> None:
        """Forgets what was counted since a copy was made."""
        self.requests[:] = before.requests
        self.errors, self.read_bytes, self.written_bytes = before.errors, before.read_bytes, before.written_bytes

    def took(self, seconds: float, count: int = 1) -> None:
        """So many requests took so long each, from their arrival to the reply."""
        self.latencies[bisect_left(LATENCIES, seconds)] += count
        self.seconds += seconds * count

    def add(self, other: Counters) -> None:
        """Adds another one's numbers."""
        self.requests = [mine + theirs for mine, theirs in zip(self.requests, other.requests, strict=True)]
        self.latencies = [mine + theirs for mine, theirs in zip(self.latencies, other.latencies, strict=True)]
        self.errors += other.errors
        self.read_bytes += other.read_bytes
        self.written_bytes += other.written_bytes
        self.seconds += other.seconds

    @property
    def total(self) -> int:
        """Requests answered."""
        return sum(self.latencies)

    def quantile(self, part: float) -> float:
        """The latency in seconds, as an upper bound, that this part of the requests did not exceed."""
        left = part * self.total
        for bound, count in zip((*LATENCIES, float("inf")), self.latencies, strict=True):
            left -= count
            if count and left <= 0:
                return bound
        return 0.0


class Metrics:
    """The whole server's numbers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._past = Counters()
        self._living: list[Counters] = []
        self.connections = 0
        self.refused = 0

    def counters(self) -> Counters:
        """New ones, for one thread."""
        counters = Counters()
        with self._lock:
            self._living.append(counters)
        return counters

    def retire(self, counters: Counters) -> None:
        """Their thread counts no more."""
        with self._lock:
            self._living = [one for one in self._living if one is not counters]
            self._past.add(counters)

    def sum(self) -> Counters:
        """Everything until now."""
        total = Counters()
        with self._lock:
            for one in [self._past, *self._living]:
                total.add(one)
        return total


def prometheus(total: Counters, clients: int, exports: int, connections: int, refused: int) -> str:
    """The numbers in Prometheus' text format 0.0.4."""
    return "\n".join(_lines(total, clients, exports, connections, refused)) + "\n"


def _lines(total: Counters, clients: int, exports: int, connections: int, refused: int) -> Iterator[str]:
    yield from _head("requests_total", "counter", "Requests received, by command.")
    for kind, count in zip(_KINDS, total.requests, strict=True):
        yield f'cowstore_nbd_requests_total{{command="{kind}"}} {count}'
    yield from _plain("errors_total", "counter", "Requests answered with an error.", total.errors)
    yield from _plain("read_bytes_total", "counter", "Bytes read by clients.", total.read_bytes)
    yield from _plain("written_bytes_total", "counter", "Bytes written by clients.", total.written_bytes)
    yield from _plain("connections_total", "counter", "Connections accepted.", connections)
    yield from _plain("connections_refused_total", "counter", "Connections turned away.", refused)
    yield from _plain("clients", "gauge", "Clients connected now.", clients)
    yield from _plain("open_exports", "gauge", "Devices open now.", exports)
    yield from _head("request_seconds", "histogram", "From a request's arrival to its reply.")
    below = 0
    for bound, count in zip((*map(str, LATENCIES), "+Inf"), total.latencies, strict=True):
        below += count
        yield f'cowstore_nbd_request_seconds_bucket{{le="{bound}"}} {below}'
    yield f"cowstore_nbd_request_seconds_sum {total.seconds:.6f}"
    yield f"cowstore_nbd_request_seconds_count {below}"


def _head(name: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP cowstore_nbd_{name} {text}"
    yield f"# TYPE cowstore_nbd_{name} {kind}"


def _plain(name: str, kind: str, text: str, value: int) -> Iterator[str]:
    yield from _head(name, kind, text)
    yield f"cowstore_nbd_{name} {value}"
