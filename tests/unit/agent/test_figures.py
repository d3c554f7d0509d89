"""Figures of the agent that need no agent."""

from pathlib import Path

from router.agent.figures import listen_overflows
from router.shm.counters import CounterSlab
from router.shm.exposition import SlabReader
from router.telemetry.runtime import Flow, RuntimeSeries
from twofold.runtime.monitor import RuntimeMonitor


def test_listen_overflows(tmp_path: Path) -> None:
    file = tmp_path / "netstat"
    file.write_text("TcpExt: SyncookiesSent ListenOverflows ListenDrops\nTcpExt: 1 23 4\nIpExt: A\nIpExt: 5\n")
    assert listen_overflows(file) == 23
    assert listen_overflows(tmp_path / "absent") == 0
    file.write_text("nonsense\n")
    assert listen_overflows(file) == 0


def test_a_flow_never_falls(tmp_path: Path) -> None:
    slab = CounterSlab.open(tmp_path / "counters.x", cells=1024, directory_bytes=1 << 16)
    cell = slab.counter("x_total", "x").cell()
    flow = Flow(slab, cell)
    for value in (3, 5, 1, 2):
        flow.to(value)
    assert slab.cells[cell] == 6.0
    slab.close()


def test_runtime_series_go_on_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "counters.relay-0"
    for _ in range(2):
        slab = CounterSlab.open(path, cells=4096, directory_bytes=1 << 16)
        monitor = RuntimeMonitor(lambda: 0.0)
        monitor.late(0.003, 0.0)
        series = RuntimeSeries(slab, "relay-0", monitor)
        series.flush(1.0)
        series.flush(2.0)
        slab.close()
    reader = SlabReader(path)
    found = {item.family.name: item for item in reader.read() if item.family.name.startswith("twofold_loop")}
    lag = found["twofold_loop_lag_seconds"]
    assert sum(lag.cells[:-1]) == 2
    assert lag.cells[-1] == 0.006
    assert found["twofold_loop_lag_max_seconds"].values == ("relay-0",)
    assert found["twofold_loop_lag_max_seconds"].cells == (0.003,)
    reader.close()
