"""Compiled code on disk and in other processes: read-only installations, first calls at one time, forks and spawns."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import thresher.protos

PACKAGES = [Path(folder) for folder in thresher.__path__]  # each holds a part of the namespace
CALL = "from thresher.protos.seeded import seeded_indices; print(seeded_indices(10, 10, key=1).tolist())"
ANSWER = f"{list(range(10))}\n"

LOADER = """
import sys
import torch
from torch.utils.data import DataLoader, Dataset
from thresher.compression import ErrorFeedback, HardThreshold
from thresher.deploy.in_process import in_process
from thresher.protos.seeded import seeded_indices

class Drawn(Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, item):
        sent = ErrorFeedback(HardThreshold(0.5), 3_000_000).compress(torch.full((3_000_000,), 1.0))
        return torch.tensor([len(seeded_indices(1000, 10, key=item)), sent.count])

def work(session):
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session.wrap(model, optimizer)
    model(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    seen = [Drawn()[0]]  # the parent calls first
    for batch in DataLoader(Drawn(), num_workers=2, multiprocessing_context=sys.argv[1], timeout=80):
        seen.extend(batch)
    print(len(seen), {tuple(row.tolist()) for row in seen})

if __name__ == "__main__":
    torch.set_num_threads(2)
    with in_process(shards=1, workers=1) as cluster:
        cluster.run(work)
"""


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    ran = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=110, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return ran


def copied(folder: Path) -> str:
    """A copy of the packages without what is compiled; returns its PYTHONPATH, ahead of the installed one."""
    roots = []
    for number, package in enumerate(PACKAGES):
        root = folder / str(number)
        shutil.copytree(package, root / "thresher", ignore=shutil.ignore_patterns("__pycache__"))
        roots.append(str(root))
    return os.pathsep.join(roots)


def test_read_only_installation_compiles_without_a_cache(tmp_path: Path) -> None:
    """Where neither the source, nor the home, nor NUMBA_CACHE_DIR can be written, a kernel still runs, in silence.

    Under root, which permissions don't stop, the folders are mounted read-only in a namespace of the process's own.
    """
    path = copied(tmp_path)
    code = (
        f"import thresher.protos.seeded; print(thresher.protos.seeded.__file__.startswith({str(tmp_path)!r})); {CALL}"
    )
    nowhere = tmp_path / "file"
    nowhere.write_text("not a folder", encoding="utf-8")
    settings = {"PYTHONPATH": path, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    settings |= {"NUMBA_CACHE_DIR": str(nowhere), "PYTHONDONTWRITEBYTECODE": "1"}
    if os.geteuid() == 0:
        probe = ["unshare", "--mount", "sh", "-c", f"mount --bind {tmp_path} {tmp_path}"]
        if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True, check=False).returncode:
            pytest.skip("root may write everywhere, and no mount namespace can be made to stop it")
        mounts = f"mount --bind {tmp_path} {tmp_path} && mount -o remount,bind,ro {tmp_path}"
        ran = run("unshare", "--mount", "sh", "-c", f'{mounts} && exec "$0" -c "$1"', sys.executable, code, **settings)
    else:
        folders = [tmp_path, *(folder for folder in tmp_path.rglob("*") if folder.is_dir())]
        for folder in folders:
            folder.chmod(0o500)
        try:
            ran = run(sys.executable, "-c", code, **settings)
        finally:
            for folder in folders:
                folder.chmod(0o700)
    assert (ran.stdout, ran.stderr) == ("True\n" + ANSWER, "")
    assert not list(tmp_path.rglob("*.nbi"))


def test_cache_goes_where_it_is_told_and_serves_the_next_process(tmp_path: Path) -> None:
    """NUMBA_CACHE_DIR comes first, and a second process compiles nothing."""
    settings = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    assert run(sys.executable, "-c", CALL, **settings).stdout == ANSWER
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb?")}
    assert written
    assert run(sys.executable, "-c", CALL, **settings).stdout == ANSWER
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb?")} == written


def test_processes_that_compile_at_one_time_do_not_disturb_each_other(tmp_path: Path) -> None:
    """All start without a cache, all answer, and what they leave serves the next."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "error", "-c", CALL]
    started = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [process.communicate(timeout=100) for process in started] == [(ANSWER, "")] * 3
    assert run(*command, NUMBA_CACHE_DIR=str(tmp_path)).stderr == ""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_processes_call_what_their_parent_has_called(method: str, tmp_path: Path) -> None:
    """Forked or spawned beside an open session, after the parent has compiled, and used threads."""
    script = tmp_path / "loader.py"
    script.write_text(LOADER, encoding="utf-8")
    ran = run(sys.executable, str(script), method, TORCH_CPP_LOG_LEVEL="ERROR")
    assert ran.stdout == "9 {(10, 3000000)}\n", ran.stderr
