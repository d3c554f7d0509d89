"""Parts of ``bench_dataplane.py``: worker stand-ins, load, the proxies measured, and how their CPU time is read."""
