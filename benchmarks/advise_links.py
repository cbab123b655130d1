"""What `thresher advise` predicts beside what a step then takes, on links of several rates.

    python benchmarks/advise_links.py [--rates 100mbit 1gbit] [--output runs/advise/result.json]

Two hosts of the lab, network namespaces behind links that a token bucket shapes each way, with 1 ms of traffic at once
and a queue of 25 ms: two shards on the first, two workers on the other. They share the cores of this machine, and
`thresher advise` is told so: --workers-here 2. It is asked on the workers' host, for each rate; then the workers train,
with everything sent and with two sparse settings. Computing is to draw a gradient, and then a pause.
Needs root and netlab.sh, in ../shared/lab or in the folder that THRESHER_LAB names. Writes a JSON list, and prints it
as the table in docs/advise.md.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

LAB = Path(os.environ.get("THRESHER_LAB", Path(__file__).parents[2] / "shared" / "lab")) / "netlab.sh"
SHARDS = ("10.77.0.1:5001", "10.77.0.1:5002")
WORKERS = 2
SETTINGS = {
    "--threshold 0": {"THRESHER_THRESHOLD": "0"},
    "--density 0.01": {"THRESHER_THRESHOLD": "0.5"},
    "--compressor 'TopK(0.01)'": {"THRESHER_COMPRESSOR": "TopK(0.01)"},
}
"""What is trained with. One element in a hundred of a gradient is about 1, the others are noise: so a threshold of 0.5
sends what one does that is steered to that density, once it stands; at first it is chosen anew in most steps.
"""
SETTLED_AFTER = 0.4  # of the steps: connections and buffers have settled by then

SCRIPT = """
import sys, time
import torch
from thresher.worker import connect

numel, steps, compute = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
parameters = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(numel // 10)) for _ in range(10)])
optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
with connect().wrap(parameters, optimizer) as session:
    generator = torch.Generator().manual_seed(session.rank)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(steps):
        until = time.perf_counter() + compute
        for parameter in parameters:
            chosen = torch.randint(parameter.numel(), (parameter.numel() // 100,), generator=generator)
            parameter.grad.normal_(std=1e-6, generator=generator)[chosen] += 1.0
        time.sleep(max(0.0, until - time.perf_counter()))
        optimizer.step()
"""


@contextmanager
def hosts(rate: str) -> Iterator[None]:
    """Lay two hosts whose links carry ``rate`` each way."""
    lab("up", "2", rate)
    try:
        yield
    finally:
        lab("down")


def lab(*arguments: str) -> None:
    subprocess.run([str(LAB), *arguments], check=True)


@contextmanager
def on(host: int, *arguments: str, **variables: str) -> Iterator["subprocess.Popen[str]"]:
    """Run Python on a host until the block ends."""
    command = [str(LAB), "exec", str(host), sys.executable, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "THRESHER_INSECURE": "1", **variables}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def shards() -> Iterator[None]:
    """Serve the shards on the first host."""
    serve = ["-m", "thresher.deploy", "serve", "--shards", str(len(SHARDS)), "--workers", str(WORKERS)]
    with ExitStack() as stack:
        for shard, address in enumerate(SHARDS):
            process = stack.enter_context(on(0, *serve, "--shard", str(shard), "--listen", address))
            assert process.stdout is not None
            json.loads(process.stdout.readline())  # it serves
        yield


def predicted(options: argparse.Namespace) -> dict[str, Any]:
    """Ask on the host of the workers."""
    ask = ["-m", "thresher.deploy", "advise", ",".join(SHARDS), "--parameters", str(options.parameters)]
    ask += ["--compute", str(options.compute), "--workers", str(WORKERS)]
    ask += ["--workers-here", str(WORKERS), "--densities", "0.01", "--json"]
    with shards(), on(1, *ask) as process:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0
    found: dict[str, Any] = json.loads(out)
    return found


def measured(variables: dict[str, str], steps: int, options: argparse.Namespace) -> dict[str, float]:
    """Train; return the medians over steps and workers of the parts of a step and of the whole."""
    with tempfile.TemporaryDirectory() as folder, shards(), ExitStack() as stack:
        files = [Path(folder, f"worker-{rank}.jsonl") for rank in range(WORKERS)]
        arguments = ["-c", SCRIPT, str(options.parameters), str(steps), str(options.compute)]
        told = {**variables, "THRESHER_SHARDS": ",".join(SHARDS), "THRESHER_WORKERS": str(WORKERS)}
        workers = [
            stack.enter_context(on(1, *arguments, THRESHER_RANK=str(rank), THRESHER_ROWS=str(file), **told))
            for rank, file in enumerate(files)
        ]
        for worker in workers:
            assert worker.wait(timeout=900) == 0
        rows = [row for file in files for row in settled(file, steps)]
    parts = {name: [row[f"{name}_seconds"] for row in rows] for name in ("compute", "compress", "exchange")}
    return {"step": median(map(sum, zip(*parts.values(), strict=True)))} | {n: median(p) for n, p in parts.items()}


def settled(file: Path, steps: int) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return rows[int(SETTLED_AFTER * steps) :]


def compare(rate: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    with hosts(rate):
        advice = predicted(options)
        print(json.dumps(advice), file=sys.stderr)
        by_setting = {one["setting"]: one for one in advice["predictions"]}
        rows = []
        for setting, variables in SETTINGS.items():
            steps = options.steps if setting != "--threshold 0" else max(10, options.steps // 6)
            found = measured(variables, steps, options)
            one = by_setting[setting]
            row = {
                "rate": rate,
                "setting": setting,
                "predicted_seconds": one["seconds"],
                "low": one["low"],
                "high": one["high"],
                "measured_seconds": found["step"],
                "error": one["seconds"] / found["step"] - 1.0,
            }
            print(json.dumps(row | {"parts": one["parts"], "measured": found}), file=sys.stderr)
            rows.append(row)
    return rows


def table_of(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| links | setting | predicted, s | 5 % … 95 % | measured, s | error |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        band = f"{row['low']:.4f} … {row['high']:.4f}"
        lines.append(
            f"| {row['rate']} | `{row['setting']}` | {row['predicted_seconds']:.4f} | {band} | "
            f"{row['measured_seconds']:.4f} | {row['error']:+.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", default=["100mbit", "1gbit"], help="as tc writes them")
    parser.add_argument("--parameters", type=int, default=2_500_000)
    parser.add_argument("--compute", type=float, default=0.05, help="seconds of computing")
    parser.add_argument("--steps", type=int, default=60, help="a sixth of them where everything is sent")
    parser.add_argument("--output", type=Path, default=Path("runs/advise/result.json"))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the hosts are taken away then, too
    rows = [row for rate in options.rates for row in compare(rate, options)]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print(table_of(rows))


if __name__ == "__main__":
    main()
