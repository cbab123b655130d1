"""Trying out a state folder, on real Ray nodes: one of them in a world of its own, with other file systems mounted."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray

from thresher.deploy.ray_cluster import storage
from thresher.deploy.ray_cluster.local import local_cluster
from thresher.deploy.ray_cluster.storage import probe
from thresher.protos.errors import ConfigurationError, ConnectionTimeoutError

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]

SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Nodes:
    """A head without CPUs and two nodes that share everything.

    Attributes:
        folder: They all see the same there.
        address: Of the head.
        untouched: Whether a trial with the head alone left the folder alone.
    """

    folder: Path
    address: str
    untouched: bool


def known(*, cpus: bool = False) -> set[str]:
    """The ids of all nodes, or of those with CPUs."""
    found: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return {node["NodeID"] for node in found if node["Resources"].get("CPU") or not cpus}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Start them, in a session of their own beside whatever else runs here."""
    folder = tmp_path_factory.mktemp("shared")
    with local_cluster(num_cpus=0) as cluster:
        probe(folder / "alone", deadline=SECONDS)
        untouched = not (folder / "alone").exists()
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        yield Nodes(folder, str(cluster.address), untouched)


@dataclass(frozen=True, slots=True)
class Hermit:
    """A third node, with mounts that nobody else sees.

    Attributes:
        node: Its id.
        process: ``ray start``, which is the leader of the group of all it has started.
        own: An empty file system.
        locked: One that cannot be written to.
        full: One with room for nothing.
    """

    node: str
    process: "subprocess.Popen[bytes]"
    own: Path
    readonly: Path
    full: Path
    lockless: Path


@pytest.fixture(scope="module")
def hermit(nodes: Nodes) -> Iterator[Hermit]:
    """Start it."""
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("needs root and mount namespaces: a node of its own sees other file systems")
    mounts = {
        "own": "mount -t tmpfs none {at}",
        "readonly": "mount -t tmpfs -o ro none {at}",
        "full": "mount -t tmpfs -o nr_inodes=3 none {at}",
        "lockless": "mount -t overlay -o lowerdir={empty},upperdir={at},workdir={work} none {at}",
    }
    folders = {name: nodes.folder / name for name in (*mounts, "empty", "work")}
    for folder in folders.values():
        folder.mkdir()
    steps = [how.format(at=folders[name], empty=folders["empty"], work=folders["work"]) for name, how in mounts.items()]
    ray_program = Path(sys.executable).with_name("ray")
    start = f"exec {ray_program} start --address={nodes.address} --num-cpus=1 --block"
    before = known()
    process = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", " && ".join([*steps, start])],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + SECONDS
        while not (new := known() - before) and time.monotonic() < deadline:
            time.sleep(0.1)
        yield Hermit(new.pop(), process, *(folders[name] for name in mounts))
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=SECONDS)


def names(error: pytest.ExceptionInfo[Exception]) -> set[str]:
    """The ids of the nodes that an error names."""
    return {node for node in known() if node[:8] in str(error.value)}


def test_a_folder_that_all_share_passes_and_stays_empty(nodes: Nodes) -> None:
    folder = nodes.folder / "not" / "there" / "yet"
    probe(folder, deadline=SECONDS)
    assert folder.is_dir()
    assert not list(folder.iterdir())


def test_nodes_without_cpus_are_left_alone(nodes: Nodes) -> None:
    assert nodes.untouched


def test_a_path_that_depends_on_the_node_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="write the whole path"):
        probe(Path("state"), deadline=SECONDS)


def test_a_folder_below_a_file_is_refused_by_every_node(nodes: Nodes) -> None:
    (nodes.folder / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"making a folder failed: .*Not a directory") as refused:
        probe(nodes.folder / "file" / "state", deadline=SECONDS)
    assert names(refused) == known(cpus=True)


def test_a_node_that_goes_during_the_trial_is_left_out(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was there when the nodes were counted, and gets no shard."""
    listed, gone = storage._candidates(), "ab" * 28
    answers = iter([{**listed, gone: "gone"}])
    monkeypatch.setattr(storage, "_candidates", lambda: next(answers, listed))
    probe(nodes.folder / "left", deadline=SECONDS)
    assert next(answers, None) is None


@pytest.mark.lab
def test_a_folder_of_the_nodes_own_is_not_shared(nodes: Nodes, hermit: Hermit) -> None:
    with pytest.raises(ConfigurationError, match="not the same on all nodes") as refused:
        probe(hermit.own, deadline=SECONDS)
    alone = next(
        line for line in str(refused.value).splitlines() if line.split(":")[0].endswith(f"({hermit.node[:8]})")
    )
    assert alone.count("(") == 2, "it sees its own work only"
    assert len(names(refused)) == 3
    assert not list(hermit.own.iterdir())


@pytest.mark.lab
def test_locks_that_do_not_reach_all_nodes_are_refused(nodes: Nodes, hermit: Hermit) -> None:
    with pytest.raises(ConfigurationError, match=r"a lock was granted that a process on .* holds"):
        probe(hermit.lockless, deadline=SECONDS)
    assert not list(hermit.lockless.iterdir())


@pytest.mark.lab
@pytest.mark.parametrize(("kind", "what"), [("readonly", "Read-only file system"), ("full", "No space left on device")])
def test_a_folder_that_cannot_be_written_is_refused_by_its_node(
    nodes: Nodes, hermit: Hermit, kind: str, what: str
) -> None:
    folder = getattr(hermit, kind)
    with pytest.raises(ConfigurationError, match=what) as refused:
        probe(folder, deadline=SECONDS)
    assert str(folder) in str(refused.value)
    assert names(refused) == {hermit.node}
    assert not list(folder.iterdir())


@pytest.mark.lab
def test_a_node_that_does_not_answer_is_named(nodes: Nodes, hermit: Hermit) -> None:
    os.killpg(hermit.process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(ConnectionTimeoutError, match="did not answer within 3 s") as late:
            probe(nodes.folder / "late", deadline=3.0)
    finally:
        os.killpg(hermit.process.pid, signal.SIGCONT)
    assert names(late) == {hermit.node}
