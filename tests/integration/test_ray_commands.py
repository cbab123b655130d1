"""The commands of docs/ray.md, and those in deploy/kuberay: their options exist, and they run.

All run here but those that need Kubernetes; the page's, and the job's script, on a Ray cluster of one node (slow).
"""

import contextlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import typer
from ray.util import get_node_ip_address
from tests.integration.kuberay import KUBERAY, ROOT, commands, containers, manifests, run_sh

from thresher.deploy.cli import app

BIN = Path(sys.executable).parent
PAGES = (ROOT / "docs" / "ray.md", ROOT / "README.md")

pytestmark = [
    pytest.mark.skipif(not KUBERAY.exists(), reason="the pages are in the repository"),
    pytest.mark.xdist_group("ray"),
]


def taken() -> dict[str, set[str]]:
    """The options of each command of ours that pages, script and job give."""
    group: Any = typer.main.get_command(app)
    verbs = group.commands["ray"].commands
    ours = {
        f"thresher ray {name}": {one for param in verb.params for one in param.opts} for name, verb in verbs.items()
    }
    example = (ROOT / "examples" / "ray_train.py").read_text(encoding="utf-8")
    return ours | {"ray_train.py": set(re.findall(r'"(--[a-z-]+)"', example))}


def test_the_commands_take_the_options_they_are_given() -> None:
    pages = (*PAGES, ROOT / "deploy" / "README.md", KUBERAY / "README.md")
    lines = [*(line for page in pages for line in commands(page)), *run_sh()]
    lines.append(manifests()["RayJob"]["spec"]["entrypoint"].replace("run.sh", "ray_train.py"))  # which gets the rest
    seen = set()
    for command, known in taken().items():
        for line in lines:
            _, found, given = line.partition(f"{command} ")
            if found:
                seen.add(command)
                assert not sorted(set(re.findall(r"--[a-z][a-z-]+", given)) - known), line
    assert seen == set(taken())


@pytest.mark.parametrize(
    ("ended", "code", "last"),
    [
        ({}, 0, "down"),
        ({"python": "7"}, 7, "down"),  # the training's own status, and the shards are gone all the same
        ({"up": "3"}, 3, "up"),  # a run of that name is up: it is not ours to end
        ({"down": "4"}, 4, "down"),
        ({"python": "7", "down": "4"}, 4, "down"),
    ],
)
def test_the_script_ends_as_the_training_has_ended(ended: dict[str, str], code: int, last: str, tmp_path: Path) -> None:
    said = tmp_path / "said"
    endings = "".join(f"{verb}) exit {status} ;;\n" for verb, status in ended.items())
    for program, verb in (("thresher", "$2"), ("python", "python")):
        lines = f'#!/bin/sh\necho "{program} $*" >> {said}\ncase {verb} in\n{endings}targets) exec sleep 60 ;;\nesac\n'
        (tmp_path / program).write_text(lines, encoding="utf-8")
        (tmp_path / program).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    command = ["sh", str(KUBERAY / "run.sh")]
    done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, timeout=30, check=False)
    assert done.returncode == code
    assert said.read_text(encoding="utf-8").splitlines()[-1].split()[:3] == ["thresher", "ray", last]


def test_the_commands_that_make_the_secrets_run(tmp_path: Path) -> None:
    """Up to the point where a cluster is needed, and what they make is good for a pod."""
    (tmp_path / "deploy").symlink_to(ROOT / "deploy")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for line in commands(KUBERAY / "README.md"):
        if line.startswith(("thresher certs", "openssl", "sed")):
            sh(line, tmp_path)
        elif line.startswith("kubectl create") and shutil.which("kubectl"):
            assert "kind: " in sh(f"{line} --dry-run=client -o yaml", tmp_path)
    secrets = tmp_path / "secrets"
    assert secrets.joinpath("tokens").read_text("utf-8") == f"worker {secrets.joinpath('token').read_text('utf-8')}"
    sh(f"POD_IP=10.1.2.3 sh {KUBERAY / 'certificate.sh'} secrets .", tmp_path)
    sh("openssl verify -CAfile secrets/ca.pem -purpose sslserver -verify_ip 10.1.2.3 shard.pem", tmp_path)
    assert (tmp_path / "shard.key").stat().st_mode & 0o077 == 0


def sh(line: str, folder: Path, env: Mapping[str, str] | None = None) -> str:
    """Run a line as a page shows it; returns what it prints, and fails with it."""
    path = {"PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["sh", "-c", line], cwd=folder, env={**os.environ, **path, **(env or {})},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{line}\n{done.stdout}"
    return done.stdout


# --- on a cluster of one node ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def head() -> Iterator[tuple[Path, dict[str, str]]]:
    """A Ray of our own, as the page starts it but for its ports; its folder, and what finds it."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: sockets lie in it
    node = get_node_ip_address()  # type: ignore[no-untyped-call]
    port, dashboard, agent, client = (str(port) for port in free_ports(4))
    env = {"RAY_ADDRESS": f"{node}:{port}", "NODE": node, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    env |= {"STATE": str(folder / "state"), "SECRETS": str(folder), "DASHBOARD": f"http://127.0.0.1:{dashboard}"}
    (line,) = (line for line in commands(ROOT / "docs" / "ray.md") if line.startswith("ray start --head"))
    command = [str(BIN / "ray"), *shlex.split(line.replace("--num-cpus 4", "--num-cpus 8"))[1:], "--block"]
    command += ["--port", port, "--dashboard-port", dashboard, "--dashboard-agent-listen-port", agent]
    command += ["--ray-client-server-port", client, "--temp-dir", str(folder / "ray"), "--disable-usage-stats"]
    started = {**os.environ, **env, "PATH": f"{BIN}:{os.environ['PATH']}"}
    started.pop("RAY_ADDRESS")
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(command, env=started, stdout=log, stderr=subprocess.STDOUT)
    try:
        probed = {"head": dashboard, "shards": agent}
        for name, asked in probed.items():
            wait_for(asked, containers()[name]["livenessProbe"]["httpGet"]["path"], process)
        yield folder, env
    finally:
        process.terminate()  # --block: it ends what it has started
        process.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def wait_for(port: str, path: str, process: "subprocess.Popen[bytes]") -> None:
    """Wait until a probe succeeds."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer,
        ):
            if answer.status == HTTPStatus.OK:
                return
        time.sleep(0.5)
    pytest.fail(f"{path} does not answer; Ray ended with {process.poll()}")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_page_s_commands_run(head: tuple[Path, dict[str, str]], page: Path) -> None:
    """From `up` to `down`, as they stand there."""
    folder, env = head
    lines = commands(page)
    begin = next(number for number, line in enumerate(lines) if line.startswith("thresher ray up"))
    shared = str(folder / page.stem)
    up, train, status, down = (line.replace("/shared", shared) for line in lines[begin : begin + 4])
    sh(up, ROOT, env)
    assert "'accuracy': 0.9" in sh(train, ROOT, env)
    assert sh(status, ROOT, env).count("SERVING: ") == 2
    sh(down, ROOT, env)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_job_runs(head: tuple[Path, dict[str, str]]) -> None:
    """The job's script, with TLS and tokens as in the pods, sent as a job to a plain cluster."""
    folder, env = head
    for line in commands(KUBERAY / "README.md"):
        if line.startswith(("thresher certs", "openssl", "sed")):
            sh(line, folder, env)
    for name in ("run", "tls", "shard"):
        (folder / name).mkdir()
    sh(f"POD_IP=$NODE sh {KUBERAY / 'certificate.sh'} secrets tls", folder, env)
    (folder / "worker").symlink_to("secrets")
    shutil.copy(folder / "secrets" / "tokens", folder / "shard")
    for script in (KUBERAY / "run.sh", ROOT / "examples" / "ray_train.py"):
        shutil.copy(script, folder / "run")
    entrypoint = manifests()["RayJob"]["spec"]["entrypoint"].replace("--gpu", "--epochs 2")
    entrypoint = entrypoint.replace("/etc/thresher", str(folder))
    said = sh(f"ray job submit --address $DASHBOARD -- {entrypoint}", folder, env)
    assert "succeeded" in said
