"""docker-compose.yml against the code: its commands are ones that exist, its settings ones that are read."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml  # type: ignore[import-untyped]

from thresher.deploy.cli import app
from thresher.worker.settings import settings_from

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker-compose.yml"
DOCKER = ROOT / "deploy" / "docker"

pytestmark = pytest.mark.skipif(not COMPOSE.exists(), reason="the files of the containers are in the repository")

SHARDS = ("shard-0", "shard-1")
WORKERS = ("worker", "worker-gpu")


def filled_in(value: Any) -> Any:
    """As compose reads it where nothing is set: `${NAME:-default}` is its default."""
    if isinstance(value, str):
        return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)
    if isinstance(value, list):
        return [filled_in(one) for one in value]
    return {key: filled_in(one) for key, one in value.items()} if isinstance(value, dict) else value


def services(path: Path = COMPOSE) -> dict[str, Any]:
    return dict(filled_in(yaml.safe_load(path.read_text(encoding="utf-8")))["services"])


def options(service: str) -> dict[str, Any]:
    """What a service's command says, as the command line takes it."""
    name, *arguments = services()[service]["command"].split()
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    return dict(command.make_context(name, arguments).params)


def environment(service: str, **more: str) -> dict[str, str]:
    return {name: str(value) for name, value in services()[service]["environment"].items()} | more


@pytest.mark.parametrize("shard", SHARDS)
def test_each_shard_is_told_its_place_and_keeps_its_state_in_its_volume(shard: str) -> None:
    told, service = options(shard), services()[shard]
    assert f"shard-{told['shard']}" == shard
    assert told["shards"] == len(SHARDS)
    (volume, mounted) = service["volumes"][0].split(":")
    assert volume == shard
    assert told["state_dir"].is_relative_to(mounted)
    assert told["iterations"].is_relative_to(mounted)


@pytest.mark.parametrize("worker", WORKERS)
def test_the_settings_of_a_worker_are_read_and_agree_with_the_shards(worker: str) -> None:
    found = settings_from(environment(worker, THRESHER_RANK="0"))
    ports = {shard: options(shard)["listen"].rpartition(":")[2] for shard in SHARDS}
    assert found.addresses == tuple(f"{shard}:{port}" for shard, port in ports.items())
    assert found.workers == int(environment("shard-0")["THRESHER_WORKERS"])
    assert found.workers == int(services()[worker]["deploy"]["replicas"])
    assert found.state_dir is not None
    (_, mounted) = services()[worker]["volumes"][0].split(":")
    assert found.state_dir.is_relative_to(mounted)
    assert "{rank}" in environment(worker)["THRESHER_ROWS"]
    assert {one["condition"] for one in services()[worker]["depends_on"].values()} == {"service_healthy"}


@pytest.mark.parametrize("worker", WORKERS)
def test_what_workers_run_is_in_the_image(worker: str) -> None:
    script, *_ = options(worker)["script"]
    assert (ROOT / script).exists()
    assert "!examples" in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("service", [*SHARDS, *WORKERS])
def test_no_container_of_ours_may_more_than_it_must(service: str) -> None:
    told = services()[service]
    assert told["read_only"] is True
    assert told["cap_drop"] == ["ALL"]
    assert "privileged" not in told
    assert "ports" not in told
    assert told["restart"] == "on-failure"


def test_what_is_published_is_published_on_this_machine_only() -> None:
    published = [port for told in services().values() for port in told.get("ports", [])]
    assert published
    assert [port for port in published if not port.startswith("127.0.0.1:")] == []


def test_prometheus_looks_where_shards_and_workers_serve_their_metrics() -> None:
    document = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))
    jobs = {job["job_name"]: job for job in document["scrape_configs"]}
    ports = {shard: options(shard)["metrics"].rpartition(":")[2] for shard in SHARDS}
    (targets,) = jobs["thresher-shard"]["static_configs"]
    assert targets["targets"] == [f"{shard}:{port}" for shard, port in ports.items()]
    (looked_up,) = jobs["thresher-worker"]["dns_sd_configs"]
    for worker in WORKERS:
        aliases = services()[worker].get("networks", {}).get("default", {}).get("aliases", [worker])
        assert looked_up["names"] == aliases
        assert str(looked_up["port"]) == environment(worker)["THRESHER_METRICS"].rpartition(":")[2]


def test_profiles_add_to_a_run_that_is_whole_without_them() -> None:
    profiles = {name: told.get("profiles", []) for name, told in services().items()}
    assert {name for name, listed in profiles.items() if not listed} == {*SHARDS, "worker", "prometheus"}
    assert profiles["worker-gpu"] == ["gpu"]
    assert profiles["grafana"] == ["monitoring"]


def test_under_tls_nobody_speaks_in_the_clear() -> None:
    overlay = services(DOCKER / "tls.yml")
    assert overlay.keys() == {"certs", *SHARDS, *WORKERS}
    made = " ".join(overlay["certs"]["entrypoint"])
    assert f"--hosts {','.join(SHARDS)} --workers {environment('worker')['THRESHER_WORKERS']}" in made
    for name in (*SHARDS, *WORKERS):
        told = overlay[name]["environment"]
        assert told["THRESHER_INSECURE"] == 0
        assert {"THRESHER_TLS_CA", "THRESHER_TLS_CERT", "THRESHER_TLS_KEY"} < told.keys()


def test_certificates_are_made_whole_and_once(tmp_path: Path) -> None:
    """What `certs` runs, in another folder: somebody who was killed has left a part of them."""
    name, *arguments = services(DOCKER / "tls.yml")["certs"]["entrypoint"]
    told = [argument.replace("/certs", str(tmp_path)) for argument in arguments]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    (tmp_path / "making").mkdir()
    (tmp_path / "making" / "ca.pem").write_text("a part", encoding="utf-8")
    made: list[dict[Path, bytes]] = []
    for _ in range(2):
        subprocess.run([name, *told], check=True, capture_output=True, timeout=60, env=os.environ | {"PATH": path})
        made.append({file: file.read_bytes() for file in (tmp_path / "made").iterdir()})
    assert made[0] == made[1]
    asked = {value for shard in WORKERS for value in services(DOCKER / "tls.yml")[shard]["environment"].values()}
    asked |= set(services(DOCKER / "tls.yml")["shard-0"]["environment"].values())
    needed = {str(one).removeprefix("/certs/").format(rank=3) for one in asked if str(one).startswith("/certs/")}
    assert needed <= {str(file.relative_to(tmp_path)) for file in made[0]}
    assert not (tmp_path / "making").exists()


def test_who_is_waited_for_until_it_is_well_says_whether_it_is() -> None:
    """By a health check of its own, or, for what is built here, the image's."""
    ours = {*SHARDS, *WORKERS}
    for told in services().values():
        for name, waited in told.get("depends_on", {}).items():
            assert waited["condition"] == "service_healthy"
            assert name in ours or "test" in services()[name]["healthcheck"]


def test_the_image_is_made_of_files_that_reach_it() -> None:
    """Docker's own rules of .dockerignore: all is left out but what an exception names."""
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] == "!"]
    needed = [*re.findall(r"deploy/docker/[\w.]+", (DOCKER / "Dockerfile").read_text(encoding="utf-8"))]
    needed += ["pyproject.toml", "constraints.txt", "LICENSE", "README.md", "examples/digits.py"]
    needed += [f"{root}/thresher" for root in ("server", "worker", "protos", "deploy")]
    for path in needed:
        assert (ROOT / path).exists(), path
        assert any(path == one or path.startswith(f"{one}/") for one in kept), path
