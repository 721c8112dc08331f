"""The runner: ``python -m benchmarks [row ...] [--json FILE] [--quick] [--threads N] [--list]``.

Each row runs in a process of its own, so that no row sees another's memory, threads or caches.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import attrs

from benchmarks.figures import Figure
from benchmarks.measure import NotHereError, Options

#: name -> module, in the order in which they run: the quick ones first
ROWS = {
    "import": "benchmarks.import_time",
    "calls": "benchmarks.call_overhead",
    "fan_out": "benchmarks.fan_out",
    "large_batch": "benchmarks.large_batch",
    "engine_training": "benchmarks.engine_training",
    "engine_sampling": "benchmarks.engine_sampling",
    "neox_sampling": "benchmarks.neox_sampling",
    "clipping": "benchmarks.clipping",
    "stack": "benchmarks.stack",
    "smollm2": "benchmarks.smollm2",
}
HEADINGS = ("figure", "ours", "peer", "theirs", "ratio", "goal")


@attrs.frozen(kw_only=True)
class Report:
    """One row's figures, or why there are none."""

    row: str
    figures: tuple[Figure, ...]
    skipped: str
    seconds: float
    load: float

    def to_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        return {
            "row": self.row,
            "figures": [figure.to_dict() for figure in self.figures],
            "skipped": self.skipped or None,
            "seconds": round(self.seconds, 1),
            "load": round(self.load, 1),
        }


def main() -> None:
    """Run the rows that were asked for, print a table for each, and write everything as JSON."""
    arguments = _arguments()
    if arguments.list:
        print("\n".join(f"{name:16} {_summary(module)}" for name, module in ROWS.items()))
        return
    options = Options(quick=arguments.quick, threads=arguments.threads)
    reports = []
    for row in arguments.rows or ROWS:
        reports.append(_isolated(row, options))
        _show(reports[-1])
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        found = {"machine": _machine(), "options": attrs.asdict(options), "rows": [one.to_dict() for one in reports]}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="row", help=f"of {', '.join(ROWS)}; all without any")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every repetition here")
    parser.add_argument("--quick", action="store_true", help="few repetitions: does it run, not how fast")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of both sides (default 1)")
    parser.add_argument("--list", action="store_true", help="say what the rows measure")
    arguments = parser.parse_args()
    unknown = [row for row in arguments.rows if row not in ROWS]
    if unknown:
        parser.error(f"no such row: {', '.join(unknown)}; there are {', '.join(ROWS)}")
    return arguments


def _isolated(row: str, options: Options) -> Report:
    """Measure one row in a fresh process."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measured, row, options).result()


def _measured(row: str, options: Options) -> Report:
    started, load, skipped, figures = time.monotonic(), os.getloadavg()[0], "", list[Figure]()
    try:
        figures = importlib.import_module(ROWS[row]).run(options)
    except NotHereError as error:
        skipped = str(error)
    seconds = time.monotonic() - started
    return Report(row=row, figures=tuple(figures), skipped=skipped, seconds=seconds, load=load)


def _show(report: Report) -> None:
    print(f"\n## {report.row} ({report.seconds:.0f} s, load {report.load:.1f})\n")
    if report.skipped:
        print(f"skipped: {report.skipped}")
        return
    lines = [list(HEADINGS), *(figure.cells() for figure in report.figures)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |", flush=True)


def _summary(module: str) -> str:
    return (importlib.import_module(module).__doc__ or "").splitlines()[0]


def _machine() -> dict[str, Any]:
    """What the figures depend on; nothing that names this particular machine."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "python": sys.version.split()[0],
        "versions": {name: _version(name) for name in ("tg-tinker", "torch", "transformers", "peft", "aiohttp")},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
