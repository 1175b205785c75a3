"""Metrics: what the server counts, and the text that a collector reads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cowstore.nbd import Counters, Metrics
from cowstore.nbd.metrics import LATENCIES
from tests.unit import nbd_messages as nbd
from tests.unit.nbd_lines import until
from tests.unit.nbd_memory import MemoryDevices
from tests.unit.nbd_serving import Serving, serving

SAMPLE = re.compile(r"([a-z_]+)(?:\{([a-z]+)=\"([^\"]*)\"\})? (-?[0-9.e+-]+|\+Inf)")


def parse(text: str) -> tuple[dict[str, str], dict[tuple[str, str], float]]:
    """Types by name, and values by name and label, of Prometheus' text; help and a type come before each."""
    kinds: dict[str, str] = {}
    values: dict[tuple[str, str], float] = {}
    assert text.endswith("\n")
    helped = set()
    for line in text.splitlines():
        if line.startswith("# HELP "):
            helped.add(line.split()[2])
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            assert name in helped
            assert name not in kinds
            kinds[name] = kind
        else:
            match = SAMPLE.fullmatch(line)
            assert match, line
            family = re.sub(r"_(bucket|sum|count)$", "", match[1]) if match[1] not in kinds else match[1]
            assert family in kinds, line
            assert (match[1], match[3] or "") not in values
            values[match[1], match[3] or ""] = float(match[4])
    return kinds, values


@pytest.fixture
def devices() -> MemoryDevices:
    return MemoryDevices({"base": b"B" * 9000}, {"desk": b"D" * 9000})


def values_of(served: Serving) -> dict[tuple[str, str], float]:
    return {
        (name.removeprefix("cowstore_nbd_"), label): value
        for (name, label), value in parse(text(served))[1].items()
    }


def text(served: Serving) -> str:
    return served.server.prometheus()


def test_text_parses(devices, tmp_path):
    with serving(devices, tmp_path) as served:
        kinds, _ = parse(text(served))
    assert {name.removeprefix("cowstore_nbd_"): kind for name, kind in kinds.items()} == {
        "requests_total": "counter",
        "errors_total": "counter",
        "read_bytes_total": "counter",
        "written_bytes_total": "counter",
        "connections_total": "counter",
        "connections_refused_total": "counter",
        "clients": "gauge",
        "open_exports": "gauge",
        "request_seconds": "histogram",
    }


def test_every_name_stands_in_the_document(devices, tmp_path):
    with serving(devices, tmp_path) as served:
        kinds, _ = parse(text(served))
    document = (Path(__file__).parents[2] / "docs" / "nbd.md").read_text()
    assert [name for name in kinds if name.removeprefix("cowstore_nbd_") not in document] == []


def test_what_is_counted(devices, tmp_path):
    with serving(devices, tmp_path) as served:
        client = served.open("desk")
        client.read(0, 5000)
        client.read(10, 90)
        client.write(0, b"w" * 300)
        client.write(0, b"w" * 50, nbd.FUA)
        client.flush()
        client.trim(0, 10)
        client.zero(0, 10)
        client.cache(0, 10)
        assert client.ask(nbd.READ, 9000, 1).error == nbd.EINVAL
        assert client.ask(99).error == nbd.EINVAL
        served.client()
        until(lambda: served.server.clients == 2)
        until(lambda: served.server.metrics.sum().total == 10)
        values = values_of(served)
    counted = {
        command: values["requests_total", command] for command in ("read", "write", "flush", "trim", "cache")
    }
    assert counted == {"read": 3, "write": 2, "flush": 1, "trim": 1, "cache": 1}
    assert values["requests_total", "write_zeroes"] == 1
    assert values["errors_total", ""] == 2
    assert values["read_bytes_total", ""] == 5090
    assert values["written_bytes_total", ""] == 350
    assert values["connections_total", ""] == 2
    assert values["clients", ""] == 2
    assert values["open_exports", ""] == 1


def test_numbers_stay_when_clients_leave(devices, tmp_path):
    with serving(devices, tmp_path) as served:
        for _ in range(3):
            client = served.open("desk")
            client.read(0, 100)
            client.flush()
            client.disconnect()
        until(lambda: served.server.clients == 0)
        values = values_of(served)
    assert values["requests_total", "read"] == values["requests_total", "flush"] == 3
    assert values["read_bytes_total", ""] == 300
    assert values["clients", ""] == values["open_exports", ""] == 0


def test_leaving_is_counted(devices, tmp_path):
    with serving(devices, tmp_path) as served:
        served.open("desk").disconnect()
        until(lambda: served.server.clients == 0)
        values = values_of(served)
    assert values["requests_total", "disc"] == 1


def test_histogram_rises_and_ends_with_all(devices, tmp_path):
    with serving(devices, tmp_path) as served:
        client = served.open("desk")
        for _ in range(50):
            client.read(0, 10)
        until(lambda: served.server.metrics.sum().total == 50)
        values = values_of(served)
    buckets = [values["request_seconds_bucket", label] for label in (*map(str, LATENCIES), "+Inf")]
    assert buckets == sorted(buckets)
    assert buckets[-1] == values["request_seconds_count", ""] == 50
    assert values["request_seconds_sum", ""] > 0


def test_counters_add_up():
    metrics = Metrics()
    one, other = metrics.counters(), metrics.counters()
    one.requests[0], other.requests[0] = 3, 4
    one.took(0.002, 3)
    other.took(100.0)
    assert metrics.sum().requests[0] == 7
    metrics.retire(one)
    assert metrics.sum().requests[0] == 7
    assert metrics.sum().total == 4
    assert metrics.sum().latencies[-1] == 1


def test_quantiles_are_upper_bounds():
    counters = Counters()
    assert counters.quantile(0.5) == 0
    counters.took(0.0002, 90)
    counters.took(0.3, 9)
    counters.took(60.0, 1)
    assert counters.quantile(0.5) == counters.quantile(0.9) == 0.00025
    assert counters.quantile(0.99) == 0.5
    assert counters.quantile(1.0) == float("inf")


@pytest.mark.parametrize("bound", LATENCIES)
def test_latency_at_a_bound_belongs_below_it(bound):
    counters = Counters()
    counters.took(bound)
    assert counters.quantile(1.0) == bound
