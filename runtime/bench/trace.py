"""A profile as a trace that ui.perfetto.dev and chrome://tracing open.

The form is Chrome's Trace Event Format: complete events ("X") in microseconds, a row ("thread")
for stages and one for ops, and the names of both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from .run import Profiled

STAGES, OPS = 1, 2  # rows


def dumps(profiles: Sequence[Profiled]) -> str:
    """Every profile as a process of one trace."""
    events = [event for pid, one in enumerate(profiles, 1) for event in _events(one, pid)]
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events}, allow_nan=False) + "\n"


def _events(one: Profiled, pid: int) -> Iterator[dict[str, Any]]:
    yield _name("process_name", one.label, pid, 0)
    yield _name("thread_name", "stages", pid, STAGES)
    yield _name("thread_name", "ops", pid, OPS)
    for stage, start, end in one.spans:
        yield _complete(stage, start, end - start, pid, STAGES, {})
    for component, layer, op, kind, start, seconds, flop, moved in one.ops:
        ceiling = one.ceilings.get(kind)
        about = {"component": component, "layer": layer, "bytes": moved}
        if flop and seconds:
            about |= {"arithmetic": kind, "FLOP": flop, "GFLOP/s": flop / seconds / 1e9}
            if ceiling:
                about["share of the ceiling"] = flop / seconds / ceiling
        yield _complete(op, start, seconds, pid, OPS, about)


def _complete(
    name: str, start: float, seconds: float, pid: int, tid: int, about: dict[str, Any]
) -> dict[str, Any]:
    times = {"ts": start * 1e6, "dur": seconds * 1e6}
    return {"name": name, "cat": "ferrotype", "ph": "X", **times, "pid": pid, "tid": tid,
            "args": about}  # fmt: skip


def _name(what: str, name: str, pid: int, tid: int) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}
