"""What `thresher advise` predicts beside what a step then takes, on links of several rates.

    python benchmarks/advise_links.py [--rates 100mbit 1gbit] [--output runs/advise/result.json]

Three hosts, network namespaces behind shaped links of one rate each way: two shards on the first, a worker on each of
the others. For each rate `thresher advise` is asked on a worker's host; then the workers train, with everything sent
and with two sparse settings. Computing is to draw a gradient, and then a pause.
Needs root and iproute2. Writes a JSON list, and prints it as a Markdown table.
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

SHARDS = ("10.78.0.1:5001", "10.78.0.1:5002")
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


class Hosts:
    """Hosts behind links of their own that meet in a switch; each link is shaped in both directions."""

    def __init__(self, count: int, rate: str, stack: ExitStack) -> None:
        """Lay them; the stack takes them away."""
        self._mark = f"adv{os.getpid() % 10**5}"
        switch = f"{self._mark}s"
        self._add(switch, stack)
        ip("-n", switch, "link", "add", "br0", "type", "bridge", "stp_state", "0", "forward_delay", "0")
        ip("-n", switch, "link", "set", "br0", "up")
        for host in range(count):
            name, port = self.name(host), f"p{host}"
            self._add(name, stack)
            ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("-n", name, "addr", "add", f"10.78.0.{host + 1}/24", "dev", "eth0")
            ip("-n", switch, "link", "set", port, "master", "br0", "up")
            for namespace, device in ((name, "lo"), (name, "eth0")):
                ip("-n", namespace, "link", "set", device, "up")
            shape(name, "eth0", rate)
            shape(switch, port, rate)

    def _add(self, namespace: str, stack: ExitStack) -> None:
        ip("netns", "add", namespace)
        stack.callback(ip, "netns", "del", namespace)

    def name(self, host: int) -> str:
        """Return that of its namespace."""
        return f"{self._mark}h{host}"

    @contextmanager
    def on(self, host: int, *arguments: str, **variables: str) -> Iterator["subprocess.Popen[str]"]:
        """Run Python on a host until the block ends."""
        command = ["ip", "netns", "exec", self.name(host), sys.executable, *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "THRESHER_INSECURE": "1", **variables}
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            try:
                yield process
            finally:
                process.kill()


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)  # noqa: S607 - wherever iproute2 is


def shape(namespace: str, device: str, rate: str) -> None:
    """Let a token bucket pass ``rate``, with a queue of 25 ms, and two milliseconds of it at once."""
    unit = {"m": 10**6, "g": 10**9}[rate[-4]]
    burst = max(4000, int(rate[:-4]) * unit // 8 // 500)
    bucket = ["root", "tbf", "rate", rate, "burst", str(burst), "latency", "25ms"]
    subprocess.run(["tc", "-n", namespace, "qdisc", "add", "dev", device, *bucket], check=True)  # noqa: S607


@contextmanager
def shards_on(hosts: Hosts) -> Iterator[None]:
    """Serve the shards on the first host."""
    serve = ["-m", "thresher.deploy", "serve", "--shards", str(len(SHARDS)), "--workers", str(WORKERS)]
    with ExitStack() as stack:
        for shard, address in enumerate(SHARDS):
            process = stack.enter_context(hosts.on(0, *serve, "--shard", str(shard), "--listen", address))
            assert process.stdout is not None
            json.loads(process.stdout.readline())  # it serves
        yield


def predicted(hosts: Hosts, options: argparse.Namespace) -> dict[str, Any]:
    """Ask on the host of a worker."""
    ask = ["-m", "thresher.deploy", "advise", ",".join(SHARDS), "--parameters", str(options.parameters)]
    ask += ["--compute", str(options.compute), "--workers", str(WORKERS), "--densities", "0.01", "--json"]
    with shards_on(hosts), hosts.on(1, *ask) as process:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0
    found: dict[str, Any] = json.loads(out)
    return found


def measured(hosts: Hosts, variables: dict[str, str], steps: int, options: argparse.Namespace) -> dict[str, float]:
    """Train; return the medians over steps and workers of the parts of a step and of the whole."""
    with tempfile.TemporaryDirectory() as folder, shards_on(hosts), ExitStack() as stack:
        files = [Path(folder, f"worker-{rank}.jsonl") for rank in range(WORKERS)]
        arguments = ["-c", SCRIPT, str(options.parameters), str(steps), str(options.compute)]
        told = {**variables, "THRESHER_SHARDS": ",".join(SHARDS), "THRESHER_WORKERS": str(WORKERS)}
        workers = [
            stack.enter_context(
                hosts.on(1 + rank, *arguments, THRESHER_RANK=str(rank), THRESHER_ROWS=str(file), **told)
            )
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
    with ExitStack() as stack:
        hosts = Hosts(1 + WORKERS, rate, stack)
        advice = predicted(hosts, options)
        print(json.dumps(advice), file=sys.stderr)
        by_setting = {one["setting"]: one for one in advice["predictions"]}
        rows = []
        for setting, variables in SETTINGS.items():
            steps = options.steps if setting != "--threshold 0" else max(10, options.steps // 6)
            found = measured(hosts, variables, steps, options)
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
