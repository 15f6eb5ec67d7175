"""Makes the offline HTML report: one page without external resources, with plots as SVG."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from simulate.cluster import Run
from simulate.latency import LatencyModel
from simulate.metrics import Array, Slo, latencies_of
from simulate.trace import Trace

_POINTS = 1500  # per line, so that the page stays small
_LOAD_BIN_S = 10.0  # short enough to see bursts
_ATTAINMENT_BIN_S = 60.0  # long enough for many requests

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; color: #222;
  padding: 0 1rem }}
table {{ border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto }}
td, th {{ padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right }}
td:first-child, th:first-child {{ text-align: left }}
svg {{ width: 100%; height: auto }}
</style></head><body>
<h1>{title}</h1>
<p>{summary}</p>
{table}
{plots}
<h2>How to read this</h2>
<p>A request meets an SLO if it ended well and its latency does not exceed the SLO; TTFT counts from
its arrival, the wait included; ITL is its mean time between two tokens. Replica-hours count from
the order to start a worker until it is gone, up to the last arrival. Static: the smallest fixed
pools that meet both SLOs for 99% of the requests, in the same simulation.</p>
<p>{model}</p>
</body></html>
"""


class Row(Protocol):
    """A policy's run; ``simulate.run.Compared`` is one."""

    @property
    def name(self) -> str: ...

    @property
    def slo(self) -> Slo: ...

    @property
    def run(self) -> Run: ...


def html_report(
    trace: Trace, model: LatencyModel, rows: Sequence[Row], values: Sequence[Mapping[str, Any]]
) -> str:
    """Return the page.

    Args:
        values: the results of each row, as plain values for the table.
    """
    summary = (
        f"{len(trace.requests):,} requests in {trace.duration_s:,.0f} s; "
        f"cold start {model.cold_start_s:g} s."
    )
    return _PAGE.format(
        title=html.escape(f"Autoscaling policies on {trace.name}"),
        summary=html.escape(summary),
        table=_table(values),
        plots=_svg(trace, rows),
        model=html.escape(f"Latency model {model.name}. {model.source}"),
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    names = [
        name
        for name in rows[0]
        if not any(isinstance(row[name], Mapping) and name != "refused" for row in rows)
    ]
    head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in names)
    lines = (
        "".join(f"<td>{html.escape(_shown(row[name]))}</td>" for name in names) for row in rows
    )
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {each}" for key, each in value.items()) or "0"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _svg(trace: Trace, rows: Sequence[Row]) -> str:
    figure = Figure(figsize=(11, 16), layout="constrained")
    axes = figure.subplots(7, 1, sharex=True)
    _plot_load(axes[0], trace)
    for row in rows:
        _plot_run(axes[1:], row)
    labels = (
        *("requests/s", "waiting requests", "running: prefill -, decode --", "prefill workers"),
        *("decode workers", "TTFT met, share", "ITL met, share"),
    )
    for axis, label in zip(axes, labels, strict=True):
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("seconds")
    axes[1].legend(loc="upper right", fontsize="small")
    out = io.StringIO()
    # Without date and with a fixed salt, the same runs make the same page.
    with matplotlib.rc_context({"svg.hashsalt": "baton", "svg.fonttype": "path"}):
        canvas: Any = FigureCanvasSVG(figure)  # its methods have no types
        canvas.print_svg(out, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    # The metadata are only addresses.
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)


def _plot_load(axis: Axes, trace: Trace) -> None:
    arrival_s = np.array([each.arrival_s for each in trace.requests])
    tokens = np.array([each.prompt_tokens for each in trace.requests])
    edges = np.arange(0.0, trace.duration_s + _LOAD_BIN_S, _LOAD_BIN_S)
    if len(edges) < 2:
        edges = np.array([0.0, _LOAD_BIN_S])
    requests, _ = np.histogram(arrival_s, edges)
    prompt_tokens, _ = np.histogram(arrival_s, edges, weights=tokens)
    axis.plot(*_thinned(edges[:-1], requests / _LOAD_BIN_S), color="black", linewidth=0.8)
    twin = axis.twinx()
    twin.plot(*_thinned(edges[:-1], prompt_tokens / _LOAD_BIN_S), color="tab:red", linewidth=0.6)
    twin.set_ylabel("prompt tokens/s", color="tab:red")


def _plot_run(axes: Sequence[Axes], row: Row) -> None:
    samples = row.run.samples
    time_s = np.array([each.time_s for each in samples])
    lines = (
        (0, [each.waiting for each in samples], "-"),
        (1, [each.running[0] for each in samples], "-"),
        (1, [each.running[1] for each in samples], "--"),
        (2, [each.ordered[0] for each in samples], "-"),
        (3, [each.ordered[1] for each in samples], "-"),
    )
    colour = None
    for index, values, style in lines:
        points = _thinned(time_s, np.array(values, dtype=float))
        (line,) = axes[index].plot(
            *points, style, color=colour, label=row.name, linewidth=0.9, drawstyle="steps-post"
        )
        colour = line.get_color()
    found = latencies_of(row.run)
    for index, meets in (
        (4, found.ttft_s <= row.slo.ttft_s),
        (5, found.itl_s <= row.slo.itl_s),
    ):
        axes[index].plot(*_shares(found.arrival_s, meets.astype(float)), color=colour)
        axes[index].set_ylim(-0.03, 1.03)


def _shares(arrival_s: Array, meets: Array) -> tuple[Array, Array]:
    """The share of requests that meet an SLO, by the minute of their arrival."""
    bins = (arrival_s // _ATTAINMENT_BIN_S).astype(int)
    counts = np.bincount(bins)
    known = counts > 0
    shares = np.bincount(bins, weights=meets)[known] / counts[known]
    return np.flatnonzero(known) * _ATTAINMENT_BIN_S, shares


def _thinned(time_s: Array, values: Array) -> tuple[Array, Array]:
    """Return at most ``_POINTS`` points; of each group the largest value, so that peaks stay."""
    group = math.ceil(len(values) / _POINTS)
    if group <= 1:
        return time_s, values
    starts = np.arange(0, len(values), group)
    return time_s[starts], np.maximum.reduceat(values, starts)
