"""Workloads, load generator, verification and report: what ``twofold replay`` and ``twofold demo`` are made of.

``formats`` turns recordings into sessions, ``render`` turns sessions into prompts, ``runner`` sends them through
``client``, ``answer`` checks what comes back, ``cache`` says what the best cache could have done, ``report`` says
what happened.
"""
