"""CounterSlab and its exposition, checked with Prometheus' own parser."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from router.shm.counters import DROPPED_SERIES, MAX_BUCKETS, OTHER, CounterSlab
from router.shm.exposition import CounterBook, SlabReader, quantile, render


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scrape(directory: Path, dead: frozenset[str] = frozenset()) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    book = CounterBook(directory)
    try:
        return samples(render(book.totals(dead)))
    finally:
        book.close()


def test_sums_over_processes(tmp_path: Path) -> None:
    for index, amount in enumerate((1.0, 2.5)):
        slab = CounterSlab.open(tmp_path / f"counters.relay-{index}")
        requests = slab.counter("twofold_requests_total", "Requests", ("pool", "code"))
        slab.inc(requests.cell("a", "200"), amount)
        slab.inc(requests.cell("b", "200"))
        slab.set(slab.gauge("twofold_inflight", "In flight").cell(), 3 + index)
        histogram = slab.histogram("twofold_ttft_seconds", "TTFT", (0.1, 1.0), ("pool",)).series("a")
        for value in (0.05, 0.1, 0.5, 7.0):
            slab.observe(histogram, value)
    got = scrape(tmp_path)
    assert got["twofold_requests_total", (("code", "200"), ("pool", "a"))] == 3.5
    assert got["twofold_requests_total", (("code", "200"), ("pool", "b"))] == 2
    assert got["twofold_inflight", ()] == 7
    assert got["twofold_ttft_seconds_bucket", (("le", "0.1"), ("pool", "a"))] == 4
    assert got["twofold_ttft_seconds_bucket", (("le", "1"), ("pool", "a"))] == 6
    assert got["twofold_ttft_seconds_bucket", (("le", "+Inf"), ("pool", "a"))] == 8
    assert got["twofold_ttft_seconds_count", (("pool", "a"),)] == 8
    assert got["twofold_ttft_seconds_sum", (("pool", "a"),)] == pytest.approx(15.3)
    without = scrape(tmp_path, frozenset({"relay-1"}))
    assert without["twofold_inflight", ()] == 3
    assert without["twofold_requests_total", (("code", "200"), ("pool", "a"))] == 3.5


def test_text_has_help_and_type_and_escapes(tmp_path: Path) -> None:
    slab = CounterSlab.open(tmp_path / "counters.agent")
    nasty = 'quote " back \\ line \n end é'
    slab.inc(slab.counter("twofold_x_total", "Help \\ with\nnew line", ("name",)).cell(nasty))
    text = render(CounterBook(tmp_path).totals())
    assert "# HELP twofold_x_total Help \\\\ with\\nnew line\n# TYPE twofold_x_total counter\n" in text
    assert samples(text)["twofold_x_total", (("name", nasty),)] == 1


def test_a_restarted_process_goes_on_with_its_counters_and_drops_its_gauges(tmp_path: Path) -> None:
    path = tmp_path / "counters.relay-0"
    for life in range(1, 4):
        slab = CounterSlab.open(path)
        slab.inc(slab.counter("twofold_requests_total", "Requests", ("pool",)).cell("a"))
        slab.observe(slab.histogram("twofold_s", "S", (1.0,)).series(), 0.5)
        assert scrape(tmp_path)["twofold_requests_total", (("pool", "a"),)] == life
        assert scrape(tmp_path)["twofold_s_count", ()] == life
        gauge = slab.gauge("twofold_inflight", "In flight").cell()
        assert slab.cells[gauge] == 0
        slab.set(gauge, 5)
        slab.inc(slab.counter(f"twofold_life_{life}_total", "L").cell())
    assert scrape(tmp_path)["twofold_life_1_total", ()] == 1


def test_a_file_of_another_layout_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "counters.relay-0"
    path.write_bytes(b"\x07" * 10_000)
    with pytest.raises(Exception, match="layout"):
        SlabReader(path)
    assert scrape(tmp_path) == {}
    slab = CounterSlab.open(path)
    slab.inc(slab.counter("twofold_requests_total", "Requests").cell())
    assert scrape(tmp_path)["twofold_requests_total", ()] == 1


def test_a_reader_follows_a_replaced_file(tmp_path: Path) -> None:
    book = CounterBook(tmp_path)
    slab = CounterSlab.open(tmp_path / "counters.a")
    slab.inc(slab.counter("twofold_one_total", "1").cell())
    assert samples(render(book.totals()))["twofold_one_total", ()] == 1
    (tmp_path / "counters.a").unlink()
    slab = CounterSlab.open(tmp_path / "counters.a")
    slab.inc(slab.counter("twofold_two_total", "2").cell(), 2)
    got = samples(render(book.totals()))
    assert ("twofold_one_total", ()) not in got
    assert got["twofold_two_total", ()] == 2


def test_label_values_are_bounded_per_metric(tmp_path: Path) -> None:
    slab = CounterSlab.open(tmp_path / "counters.a")
    family = slab.counter("twofold_requests_total", "R", ("pool",), max_series=8)
    for number in range(5000):
        slab.inc(family.cell(f"pool-{number}"))
    got = {k: v for k, v in scrape(tmp_path).items() if k[0] == "twofold_requests_total"}
    assert len(got) == 8
    assert sum(got.values()) == 5000
    assert got["twofold_requests_total", (("pool", OTHER),)] == 4993
    assert len(family._cells) <= 16
    histograms = slab.histogram("twofold_s", "S", (1.0,), ("pool",), max_series=4)
    for number in range(100):
        slab.observe(histograms.series(f"pool-{number}"), 0.5)
    assert scrape(tmp_path)["twofold_s_count", (("pool", OTHER),)] == 97
    assert len(histograms._histograms) <= 8


def test_a_full_slab_drops_and_counts_series_and_hurts_no_other(tmp_path: Path) -> None:
    slab = CounterSlab.open(tmp_path / "counters.a", cells=80, directory_bytes=2048)
    first = slab.counter("twofold_first_total", "F").cell()
    family = slab.histogram("twofold_s", "S", [float(i) for i in range(1, MAX_BUCKETS + 1)], ("pool",))
    for number in range(20):
        slab.observe(family.series(str(number)), 1e9)
    many = slab.counter("twofold_many_total", "M", ("n",))
    for number in range(200):
        slab.inc(many.cell(f"{number}"))
    slab.inc(first)
    got = scrape(tmp_path)
    assert got["twofold_first_total", ()] == 1
    assert got[DROPPED_SERIES, ()] > 20
    assert all(value in (0, 1) for (name, _), value in got.items() if name == "twofold_many_total")


def test_definitions_must_agree(tmp_path: Path) -> None:
    slab = CounterSlab.open(tmp_path / "counters.a")
    slab.counter("twofold_x_total", "X", ("a",))
    with pytest.raises(ValueError, match="already defined"):
        slab.counter("twofold_x_total", "X", ("a", "b"))
    with pytest.raises(ValueError, match="has labels"):
        slab.counter("twofold_x_total", "X", ("a",)).cell("1", "2")
    for bounds in ((), (1.0, 1.0), (2.0, 1.0), tuple(float(i) for i in range(100))):
        with pytest.raises(ValueError, match="bounds"):
            slab.histogram("twofold_s", "S", bounds)


@settings(deadline=None)
@given(values=st.lists(st.floats(0, 20, allow_nan=False), max_size=200), data=st.data())
def test_histograms_count_as_prometheus_does(
    tmp_path_factory: pytest.TempPathFactory, values: list[float], data: st.DataObject
) -> None:
    bounds = sorted(data.draw(st.sets(st.floats(0.001, 15), min_size=1, max_size=MAX_BUCKETS)))
    directory = tmp_path_factory.mktemp("h")
    slab = CounterSlab.open(directory / "counters.a", cells=256, directory_bytes=8192)
    histogram = slab.histogram("twofold_s", "S", bounds).series()
    for value in values:
        slab.observe(histogram, value)
    (item,) = [s for s in CounterBook(directory).totals() if s.family.name == "twofold_s"]
    for index, bound in enumerate(bounds):
        assert sum(item.cells[: index + 1]) == sum(value <= bound for value in values)
    assert sum(item.cells[:-1]) == len(values)
    assert item.cells[-1] == pytest.approx(sum(values))
    slab.close()


def test_quantiles_interpolate_inside_a_bucket(tmp_path: Path) -> None:
    slab = CounterSlab.open(tmp_path / "counters.a")
    histogram = slab.histogram("twofold_s", "S", (1.0, 2.0, 4.0)).series()
    book = CounterBook(tmp_path)

    def item_quantile(q: float) -> float:
        (item,) = [s for s in book.totals() if s.family.name == "twofold_s"]
        return quantile(item, q)

    assert item_quantile(0.5) == 0
    for value in (0.5, 1.5, 1.5, 3.0):
        slab.observe(histogram, value)
    assert item_quantile(0.25) == 1.0
    assert item_quantile(0.5) == 1.5
    assert item_quantile(1.0) == 4.0
    slab.observe(histogram, 100.0)
    assert item_quantile(1.0) == 4.0


WRITER = """
import sys
from pathlib import Path
from router.shm.counters import CounterSlab

slab = CounterSlab.open(Path(sys.argv[1]))
family = slab.counter("twofold_n_total", "N", ("n",), max_series=400)
for number in range(int(sys.argv[2])):
    slab.inc(family.cell(str(number % 399)))
"""


def test_a_reader_beside_a_writing_process_sees_whole_lines_and_growing_sums(tmp_path: Path) -> None:
    total = 300_000
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "counters.w"), str(total)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        book, last, deadline = CounterBook(tmp_path), 0.0, time.monotonic() + 60
        while last < total and time.monotonic() < deadline:
            now = sum(s.cells[0] for s in book.totals() if s.family.name == "twofold_n_total")
            assert now >= last
            last = now
        assert last == total
        assert writer.wait(timeout=10) == 0
    finally:
        writer.kill()
        writer.wait()
