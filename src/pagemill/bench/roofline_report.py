"""From the measurements of `bench roofline` to its report. Owns the JSON object and the terminal's tables."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from pagemill.base.units import format_bytes, format_seconds
from pagemill.bench.machine import describe_git, describe_machine, describe_versions, disturbance
from pagemill.bench.report import Row, rounded, timestamp
from pagemill.bench.roofline import Measurement, Settings, Subject, Timed, limit_of
from pagemill.bench.roofline_peaks import ARITHMETICS, MEMORY, NEAR, Peaks

_BUFFERS = {MEMORY: "memory read, {}", NEAR: "memory read, {} (as the weights)"}


def make_report(subject: Subject, settings: Settings, found: Measurement) -> dict[str, Any]:
    """The bench's JSON object, without the names of its files. Rates per second, times in seconds, sizes in bytes."""
    peaks, threads = found.meter.peaks, subject.num_threads
    machine = describe_machine(subject.model.target, threads) | {
        "barrier_ns": {str(count): round(least, 1) for count, least in peaks.barrier_ns.items()},
        "cpu_shares": disturbance(found.before, found.after),
    }
    return {
        "bench": "roofline",
        "date": timestamp(),
        "machine": machine,
        "versions": describe_versions(),
        "git": describe_git(),
        "settings": {
            "name": subject.model.name,
            "weights": "random" if subject.model.random else "checkpoint",
            "weight_format": subject.model.main_format(),
            "weight_bytes": subject.model.weight_bytes,
            "kv_codec": subject.steps.kv_spec.codec,
            "kv_bytes_per_token": subject.steps.kv_spec.bytes_per_token,
            "num_rounds": settings.num_rounds,
            "quick": settings.quick,
        },
        "interrupted": found.interrupted,
        "peaks": _peaks_json(peaks, found.meter.buffer_bytes),
        "rows": [_row_json(row, peaks, threads) for row in found.rows if row.samples],
    }


def _peaks_json(peaks: Peaks, buffer_bytes: dict[str, int]) -> list[dict[str, Any]]:
    """One object for each peak: what, threads, the best rate, its unit (bytes or multiply-adds per second)."""
    reading = [
        {"what": what, "kind": "bandwidth", "bytes": buffer_bytes[what], "threads": threads, "rate": rounded(rate)}
        for (what, threads), rate in peaks.read_bytes.items()
    ]
    multiplying = [
        {"what": what, "kind": "arithmetic", "threads": threads, "rate": rounded(rate)}
        for (what, threads), rate in peaks.multiply_adds.items()
        if rate > 0
    ]
    return [
        each | {"unit": "B/s" if each["kind"] == "bandwidth" else "multiply-adds/s"} for each in reading + multiplying
    ]


def _row_json(row: Timed, peaks: Peaks, threads: int) -> dict[str, Any]:
    target = row.target
    needed, limit = target.demand, limit_of(target.demand, peaks, threads)
    rates = tuple(target.num_tokens / seconds for seconds in row.samples)
    decode = {"num_seqs": target.steps[0].num_seqs} if target.phase == "decode" else {}
    return Row(target.name, "native step", "tok/s", rates).as_json() | {
        "phase": target.phase,
        "context": target.steps[-1].context,
        **decode,
        "best": rounded(max(rates)),
        "best_s": rounded(row.best_s),
        "bound": limit.bound,
        "limit": rounded(target.num_tokens / limit.seconds),
        "share": rounded(limit.seconds / row.best_s),
        "memory_s": rounded(limit.memory_s),
        "arithmetic_s": rounded(limit.arithmetic_s),
        "weight_bytes": needed.weight_bytes,
        "kv_bytes": needed.kv_bytes,
        "multiply_adds": needed.multiply_adds,
    }


def title_of(report: dict[str, Any]) -> str:
    """Model and formats in one line."""
    settings = report["settings"]
    weights = "random weights, " if settings["weights"] == "random" else ""
    return f"{settings['name']} ({weights}{settings['weight_format']}, KV {settings['kv_codec']}) against this machine"


def make_tables(report: dict[str, Any]) -> list[Table]:
    """What the machine can do, and what the steps reach of it."""
    return [_peaks_table(report), _rows_table(report)]


def _peaks_table(report: dict[str, Any]) -> Table:
    counts = sorted({each["threads"] for each in report["peaks"]})
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("this machine at most")
    for count in counts:
        table.add_column(f"{count} thread{'s' * (count > 1)}", justify="right")
    rates = {(each["what"], each["threads"]): each for each in report["peaks"]}
    for what in (*_BUFFERS, *ARITHMETICS):
        cells = [rates.get((what, count)) for count in counts]
        first = next((each for each in cells if each is not None), None)
        if first is None:
            continue
        reading = first["kind"] == "bandwidth"
        name = _BUFFERS[what].format(format_bytes(first["bytes"])) if reading else ARITHMETICS[what]
        unit = "GB/s" if reading else "G/s"
        table.add_row(name, *("–" if each is None else f"{each['rate'] / 1e9:,.1f} {unit}" for each in cells))
    return table


def _rows_table(report: dict[str, Any]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("native step", no_wrap=True)
    for name in ("tok/s", "limit", "share", "reading", "multiplying"):
        table.add_column(name, justify="right")
    table.add_column("bound by")
    for row in report["rows"]:
        if row["phase"] == "decode" and row is _first_decode(report):
            table.add_section()
        table.add_row(
            row["work"],
            f"{row['best']:,.0f}",
            f"{row['limit']:,.0f}",
            f"{row['share']:.0%}",
            format_seconds(row["memory_s"]),
            format_seconds(row["arithmetic_s"]),
            row["bound"],
        )
    return table


def _first_decode(report: dict[str, Any]) -> dict[str, Any] | None:
    return next((row for row in report["rows"] if row["phase"] == "decode"), None)


def remarks(report: dict[str, Any]) -> list[str]:
    """What the figures were measured on and how to read them, one line each."""
    machine, settings = report["machine"], report["settings"]
    barriers = ", ".join(f"{each:,.0f} ns with {count} threads" for count, each in machine["barrier_ns"].items())
    contexts = sorted({row["context"] for row in report["rows"] if row["phase"] == "decode"})
    used = [name for name in ARITHMETICS if any(name in row["multiply_adds"] for row in report["rows"])]
    lines = [
        f"{machine['cpu']}, {machine['num_threads']} of {machine['num_cores']} cores, {machine['target']}; "
        f"barrier {barriers or 'none with 1 thread'}",
        f"Best of all samples ({settings['num_rounds']} a row or more), for peaks and steps alike; G/s: 10⁹ "
        f"multiply-adds per second; decoding at context {', '.join(f'{each:,}' for each in contexts)}.",
        "Limit: the longer of reading weights and KV cache (as fast as memory of the weights' size) and of all "
        f"multiply-adds ({', '.join(ARITHMETICS[name] for name in used)}), both going on at once.",
    ]
    shares = machine["cpu_shares"]
    if shares is not None:
        lines.append(
            f"of all CPU time: this process {shares['own']:.0%}, other processes {shares['others']:.0%}, taken by the "
            f"hypervisor {shares['steal']:.1%}"
        )
    if report["interrupted"]:
        lines.append("interrupted: fewer rounds than asked for")
    return lines
