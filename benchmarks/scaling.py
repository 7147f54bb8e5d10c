"""The cost of the OT term by batch size and number of processes, and an estimate for ImageNet-64.

python -m benchmarks --only scaling                 measures batch sizes, and one and two processes
python -m benchmarks.scaling --output FILE          the estimate from measured figures and the constants below
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ot_diffusers.reporting.report import format_number
from ot_diffusers.training.processes import gather_rows
from ot_diffusers.transport import sinkhorn_divergence, sinkhorn_potentials
from ot_diffusers.transport.geometry import MAX_DENSE_ENTRIES

from .solver import clouds
from .timing import Row, interleave, ratio_row
from .training import Step, configuration

HERE = Path(__file__).parent
MEASURED = {"batch": 128, "references": 2000, "dimension": 128}
"""Sizes of the training step and of the exponents in the files of results."""

# What the estimate assumes.
PROCESSES = 8
DIMENSION = 512
PARAMETERS = 296e6
"""Parameters of the UNet: ADM for ImageNet-64."""
FORWARD_FLOPS = 200e9
"""Forward pass of one image."""
NETWORK_FLOPS = 400e12
"""Per second and GPU in bfloat16: 40% of the peak of an H100."""
FLOAT32_FLOPS = 30e12
"""Per second and GPU in matrix products of the solver: half of the peak without tensor cores."""
MEMORY_RATE = 2e12
"""Bytes per second: 60% of the peak of an H100."""
LINKS = {"NVLink": 450e9, "InfiniBand": 50e9}
"""Bytes per second and GPU in one direction."""


def rows(quick: bool, device: torch.device) -> Iterator[Row]:
    yield from batch_rows(quick, device)
    if device.type == "cpu":
        yield from process_rows(quick)


def batch_rows(quick: bool, device: torch.device) -> list[Row]:
    """The training step with and without the OT term by batch size, with a small UNet, which is the harder case."""
    ratios = []
    for batch in (16, 32) if quick else (32, 64, 128):
        config = dataclasses.replace(configuration(quick=True), train_batch_size=batch)
        step = Step(dataclasses.replace(config, num_reference_samples=500 if quick else 2000), device)
        candidates = {"plain": step.run, "with our term": lambda step=step: step.run(step.ours)}
        seconds = interleave(candidates, 3)
        name = f"OT training step / plain step, small UNet, batch {batch}"
        ratios.append(ratio_row(name, seconds, "with our term", "plain"))
    return ratios


def process_rows(quick: bool) -> list[Row]:
    """The OT term of one global batch on two CPU processes, compared with one process.

    Every process solves the whole problem, so a ratio of 1 means no overhead. The two are timed one after the other,
    which needs an idle machine.
    """
    batch, references = (64, 500) if quick else (256, 2000)
    seconds = {name: term_seconds(count, batch, references) for name, count in (("one", 1), ("two", 2))}
    name = f"OT term of a global batch of {batch} on 2 CPU processes / on 1"
    return [ratio_row(name, seconds, "two", "one")]


def term_seconds(processes: int, batch: int, references: int) -> list[float]:
    """Seconds of gather, loss and gradient in fresh processes with one thread each."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--num_cpu_threads_per_process", "1", "--main_process_port", "0"]
    launch += ["-m", "benchmarks.scaling", "--term", str(batch), str(references)]
    done = subprocess.run(launch, check=True, capture_output=True, text=True, cwd=HERE.parent)
    return list(json.loads(done.stdout.splitlines()[-1]))


def time_term(batch: int, references: int, repeats: int = 5) -> list[float]:
    """The part of this process in `term_seconds`."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    x, y = clouds(batch, references, MEASURED["dimension"], torch.device("cpu"))
    share = x.tensor_split(accelerator.num_processes)[accelerator.process_index]
    seconds = []
    for _ in range(repeats + 1):
        features = share.clone().requires_grad_()
        accelerator.wait_for_everyone()
        started = time.perf_counter()
        sinkhorn_divergence(gather_rows(features, accelerator), y, blur=0.3, y_self_cost=0.0).backward()
        seconds.append(time.perf_counter() - started)
    if accelerator.is_main_process:
        sys.stdout.write(f"{json.dumps(seconds[1:])}\n")
    accelerator.end_training()
    return seconds[1:]


# --- The estimate -----------------------------------------------------------------------------------------------------


def estimate(gpu: Mapping[str, Any], cpu: Mapping[str, Any]) -> dict[str, Any]:
    """The table, from the results of a GPU (training step) and of a CPU (exponents)."""
    step = row_named(gpu, "OT training step / plain step")["seconds"]
    term = step["with our term"] - step["plain"]
    exponents = {name: row_named(cpu, f"exponent of the loss' time in {name}")["value"] for name in "NMD"}
    passes = solver_passes()
    cases = [(batch, references) for batch in (1024, 2048) for references in (10_000, 50_000)]
    columns = [case(batch, references, term, exponents, passes) for batch, references in cases]
    sizes = "×".join(map(str, MEASURED.values()))
    assumed = [
        f"{PROCESSES} H100 with one process each, and every process solves the whole problem; D = {DIMENSION}.",
        f"A UNet of {PARAMETERS / 1e6:.0f}M parameters and {FORWARD_FLOPS / 1e9:.0f} GFLOP per image, three times "
        f"as many with its gradient, at {NETWORK_FLOPS / 1e12:.0f} TFLOP/s.",
        f"The lower estimate of the term treats the {1e3 * term:.1f} ms measured at {sizes} as a constant overhead and "
        f"adds {passes} Sinkhorn iterations (counted at that size on a CPU) at {MEMORY_RATE / 1e12:g} TB/s over a "
        f"stored plan. Beyond 2^{MAX_DENSE_ENTRIES.bit_length() - 1} entries, every iteration computes the plan again "
        f"at {FLOAT32_FLOPS / 1e12:.0f} TFLOP/s.",
        "The higher estimate treats this time as work that grows with the exponents measured on a CPU: "
        + ", ".join(f"{name}^{value:.2f}" for name, value in exponents.items())
        + ".",
        "Links with "
        + ", ".join(f"{rate / 1e9:.0f} GB/s ({name})" for name, rate in LINKS.items())
        + " and no latency.",
    ]
    header = ["estimate for batch × references", *(f"{batch:,} × {references:,}" for batch, references in cases)]
    table = [[name, *(column[name] for column in columns)] for name in columns[0]]
    summary = "An estimate, not a measurement. It assumes:\n\n" + "\n".join(f"- {line}" for line in assumed)
    return {"summary": summary, "table": {"header": header, "rows": table}}


def case(batch: int, references: int, term: float, exponents: Mapping[str, float], passes: int) -> dict[str, str]:
    """One column: seconds, bytes and shares for a global batch and a number of references."""
    plain = 3 * FORWARD_FLOPS * batch / PROCESSES / NETWORK_FLOPS
    entries = batch * references
    stored = entries <= MAX_DENSE_ENTRIES
    one_pass = 4 * entries / MEMORY_RATE if stored else 2 * entries * DIMENSION / FLOAT32_FLOPS
    least = term + passes * one_pass
    growth = {
        "N": batch / MEASURED["batch"],
        "M": references / MEASURED["references"],
        "D": DIMENSION / MEASURED["dimension"],
    }
    most = term
    for name, factor in growth.items():
        most *= factor ** exponents[name]
    low, high = sorted((least, most))
    others = (PROCESSES - 1) / PROCESSES
    gathered = 4 * batch * DIMENSION * others
    gradients = 2 * 4 * PARAMETERS * others
    return {
        "plain step": milliseconds(plain),
        "OT term": f"{format_number(1e3 * low)} … {milliseconds(high)}",
        "OT step / plain step": f"{format_number(1 + low / plain)} … {format_number(1 + high / plain)}×",
        "features gathered by a process": megabytes(gathered),
        "gradients exchanged by a process": megabytes(gradients),
        **{f"gather over {name}": milliseconds(gathered / rate) for name, rate in LINKS.items()},
        "memory of the references": megabytes(4 * references * DIMENSION),
        "memory of the plan": megabytes(4 * entries) if stored else "blocks of it",
    }


def solver_passes() -> int:
    """Sinkhorn iterations of the measured problem, at the blur of the training loss."""
    x, y = clouds(MEASURED["batch"], MEASURED["references"], MEASURED["dimension"], torch.device("cpu"))
    return sinkhorn_potentials(x, y, blur=0.3).iterations


def row_named(results: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return next(row for part in results["parts"].values() for row in part if row["name"] == name)


def milliseconds(seconds: float) -> str:
    return f"{format_number(1e3 * seconds)} ms"


def megabytes(count: float) -> str:
    return f"{format_number(count / 1e6)} MB"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--output", default=str(HERE / "scaling.json"), help="file (%(default)s)")
    parser.add_argument("--term", nargs=2, type=int, metavar=("BATCH", "REFERENCES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.term:
        time_term(*arguments.term)
        return 0
    gpu, cpu = (json.loads((HERE / name).read_text("utf-8")) for name in ("results_h100.json", "results.json"))
    results = estimate(gpu, cpu)
    Path(arguments.output).write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
