"""The fleet's state as one pure reducer over events, and the snapshots routers get of it.

Nothing here reads a clock, a socket or a file: events carry their times (monotonic seconds of the control plane).
"""
