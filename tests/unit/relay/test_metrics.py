"""What a relay counts, against plain counting."""

from bisect import bisect_left
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given
from hypothesis import strategies as st

from router.shm.counters import CounterSlab
from router.telemetry.metrics import RelayMetrics
from twofold.model.histogram import INTER_TOKEN_S

_GAPS = st.floats(0.0, 100.0) | st.sampled_from(INTER_TOKEN_S)


@given(st.lists(st.tuples(st.integers(1, 4), _GAPS), max_size=30))
def test_gaps_between_events_fall_into_their_buckets(runs: list[tuple[int, float]]) -> None:
    with TemporaryDirectory() as folder:
        metrics = RelayMetrics(CounterSlab.open(Path(folder) / "counters"))
        pool = metrics.pool("p")
        expected = [0.0] * (len(INTER_TOKEN_S) + 1)
        for events, gap_s in runs:
            pool.output(events, gap_s)
            expected[bisect_left(INTER_TOKEN_S, gap_s / events)] += events
        series = metrics.inter_token.series("p")
        assert list(metrics.slab.cells[series.base : series.base + len(expected)]) == expected
        assert metrics.slab.cells[pool.events] == sum(events for events, _ in runs)
        metrics.slab.close()


def test_answers_are_counted_by_pool_and_code(tmp_path: Path) -> None:
    metrics = RelayMetrics(CounterSlab.open(tmp_path / "counters"))
    pool, cells = metrics.pool("p"), metrics.slab.cells
    cells[pool.inflight] += 3.0
    for code in (200, 200, 503):
        pool.answered(code, 0.5)
    assert cells[pool.inflight] == 0.0
    assert cells[metrics.requests.cell("p", "200")] == 2.0
    assert cells[metrics.requests.cell("p", "503")] == 1.0
    assert cells[pool.duration.sum_cell] == 1.5
