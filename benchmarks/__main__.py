"""Measure all figures of the table, print them, and write them to a file.

python -m benchmarks                     all parts, on a GPU if there is one
python -m benchmarks --quick             small sizes, to check that everything runs
python -m benchmarks --only solver       one part; the others keep their rows in the file
python -m benchmarks --resume            the parts that the file does not have from this commit
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ot_diffusers.reporting.page import provenance
from ot_diffusers.reporting.report import format_number

from . import couplings, evaluation, latent, package, rebalancing, sampling, scaling, solver, training
from .timing import Row

PARTS = {
    "solver": solver,
    "training": training,
    "couplings": couplings,
    "scaling": scaling,
    "sampling": sampling,
    "latent": latent,
    "rebalancing": rebalancing,
    "evaluation": evaluation,
    "package": package,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="parts to measure")
    parser.add_argument("--resume", action="store_true", help="only what the file does not have from this commit")
    parser.add_argument("--output", default=str(Path(__file__).parent / "results.json"), help="file (%(default)s)")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    file = Path(arguments.output)
    earlier = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    same = earlier.get("quick") == arguments.quick and earlier.get("machine") == machine(device)
    parts: dict[str, list[dict[str, Any]]] = earlier["parts"] if same else {}
    where = provenance()
    done = parts.keys() if arguments.resume and same and earlier["provenance"] == where else ()
    for name in (part for part in arguments.only or PARTS if part not in done):
        started = time.monotonic()
        print(f"\n{name}", flush=True)
        rows = []
        for row in PARTS[name].rows(arguments.quick, device):
            print(f"  {line(row)}", flush=True)
            rows.append(row)
        print(f"  {time.monotonic() - started:.0f} s", flush=True)
        parts[name] = [dataclasses.asdict(row) | {"reached": row.reached} for row in rows]
        results = {
            "quick": arguments.quick,
            "machine": machine(device),
            "table": table(parts),
            "parts": parts,
            "provenance": where,
        }
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(file)
    return 0


def machine(device: torch.device) -> str:
    """The hardware of the measurement."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def table(parts: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[Any]]:
    """The figures as documents quote them: median, range over the repeats, target."""
    rows = []
    for entry in (row for name in PARTS for row in parts.get(name, ())):
        low, high = (format_number(value) for value in entry["spread"])
        target = entry["target"]
        bound = "" if target is None else f"{'≥' if entry['at_least'] else '≤'} {target:g}"
        figure = f"{format_number(entry['value'])}{entry['unit']}"
        rows.append([entry["name"], f"**{figure}**" if entry["reached"] else figure, f"{low} … {high}", bound])
    return {"header": ["figure", "median", "range", "target"], "rows": rows}


def line(row: Row) -> str:
    """One row for a terminal: figure, range over the repeats, target, and the times behind it."""
    low, high = (format_number(value) for value in row.spread)
    bound = "" if row.target is None else f", target {'≥' if row.at_least else '≤'} {row.target:g}"
    mark = {True: " ✓", False: " ✗", None: ""}[row.reached]
    parts = "; ".join(f"{name} {format_number(value)} s" for name, value in row.seconds.items())
    return f"{row.name}: {format_number(row.value)}{row.unit} [{low}, {high}]{bound}{mark}" + (
        f"  ({parts})" if parts else ""
    )


if __name__ == "__main__":
    sys.exit(main())
