"""A cluster for measurements and tests: real processes, and what others have on this machine stays as it is."""

import os
from pathlib import Path

import pytest
import ray

from thresher.deploy.ray_cluster.local import local_cluster

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]


def test_a_cluster_takes_no_one_elses_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray notes the newest cluster of a machine where `auto` looks; this one is not meant. Its folder goes with it."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    noted = tmp_path / "ray" / "ray_current_cluster"
    noted.parent.mkdir()
    noted.write_text("192.0.2.9:6379", encoding="utf-8")
    with local_cluster(num_cpus=1) as cluster:
        cluster.add_node(num_cpus=1)
        assert len(ray.nodes()) == 2  # type: ignore[no-untyped-call]
        folder = Path(ray.get_runtime_context().get_temp_dir())
        assert folder.exists()
    assert not folder.exists()
    assert not ray.is_initialized()
    assert noted.read_text(encoding="utf-8") == "192.0.2.9:6379"
    assert os.environ["RAY_TMPDIR"] == str(tmp_path)
