"""Routing traces: which experts a model's router chose, token by token.

Covers: the file format (`format`, docs/trace.md), writing it as tokens come (`writer`), other people's arrays
(`arrays`) and recording from a running model (`recorder`, the only file here that knows torch). Does not cover: what a
trace shows; see `analyze`.
"""

from greenroom.trace.arrays import import_arrays
from greenroom.trace.format import RoutingTrace, read_trace
from greenroom.trace.writer import TraceWriter, check_place, write_trace

__all__ = ["RoutingTrace", "TraceWriter", "check_place", "import_arrays", "read_trace", "write_trace"]
