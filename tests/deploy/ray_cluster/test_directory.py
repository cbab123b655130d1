"""Workers find a run by its name: what they are told of it, and where each shard is at any time."""

import os
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from thresher.deploy.certificates import write_certificates
from thresher.deploy.ray_cluster import RayConfig, TlsPaths, down, status, up
from thresher.deploy.ray_cluster.calls import own_ip
from thresher.deploy.ray_cluster.directory import RayDirectory
from thresher.protos.credentials import Credentials, TlsFiles
from thresher.protos.errors import ConfigurationError, ConnectionTimeoutError, RoundFailedError
from thresher.worker import Method, connect
from thresher.worker.calls import ShardCalls, ShardLostError
from thresher.worker.settings import settings_from

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_node"), pytest.mark.xdist_group("ray")]

SECONDS = 100.0
TOKEN = "w" * 43


@pytest.fixture(scope="module")
def run(one_node: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two shards that speak TLS and ask for certificates and tokens."""
    folder = tmp_path_factory.mktemp("run")
    pairs = write_certificates(folder / "certificates", [own_ip()])
    shard, worker = (TlsPaths(pairs["ca"][0], *pairs[name]) for name in ("shard", "worker-0"))
    for name, text in (("tokens", f"worker {TOKEN}\n"), ("token", TOKEN)):
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o600)
    config = RayConfig(
        "secret", 2, method=Method(threshold=0.0), state_dir=folder / "state", cpus=0.25,
        tls=shard, tokens=folder / "tokens", worker_tls=worker, worker_token_file=folder / "token",
    )  # fmt: skip
    up(config, deadline=SECONDS)
    yield "secret"
    down("secret")


def test_a_worker_is_told_all_but_its_rank(run: str) -> None:
    """By the run, and where its endpoint goes by its node. That Ray Train is imported makes no worker of it."""
    told = RayDirectory().variables(run)
    assert told["THRESHER_SHARDS"] == "ray://secret/0,ray://secret/1"
    assert told["THRESHER_METRICS"] == f"{own_ip()}:0"
    assert not told.keys() & {"THRESHER_RANK", "THRESHER_WORKERS"}


def in_train(config: dict[str, Any]) -> None:
    told = RayDirectory().variables(config["run"])
    context = ray.train.get_context()
    assert told["THRESHER_RANK"] == str(context.get_world_rank())
    assert told["THRESHER_WORKERS"] == "2"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray Train uses what Ray deprecates
def test_a_worker_of_ray_train_is_told_its_rank_too(run: str, tmp_path: Path) -> None:
    """Its rank and the size of its group are those of Ray Train."""
    scaling = ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.25})
    storage = RunConfig(storage_path=str(tmp_path))
    TorchTrainer(in_train, train_loop_config={"run": run}, scaling_config=scaling, run_config=storage).fit()


def test_what_is_not_there_is_no_matter_of_waiting(run: str) -> None:
    """No such run: how to start one. No such shard: never to be found."""
    with pytest.raises(ConfigurationError, match="thresher ray up nobody"):
        RayDirectory().variables("nobody")
    for name, shard in (("nobody", 0), (run, 2)):
        with pytest.raises(RoundFailedError, match=f"{name} has no shard {shard}"):
            RayDirectory().locate(name, shard)


def test_a_shard_that_was_killed_is_found_where_it_is_then(run: str) -> None:
    """Until then a later question may have an answer."""
    directory, victim = RayDirectory(), status(run)[1]
    assert directory.locate(run, 1) == victim.address
    os.kill(victim.pid, signal.SIGKILL)
    while True:
        try:
            if (found := directory.locate(run, 1)) != victim.address:
                break
        except ConnectionTimeoutError:
            continue
    assert found == status(run)[1].address


def test_a_worker_that_comes_while_all_shards_are_started_again_waits_for_one(run: str) -> None:
    """As after the loss of a node with all of them."""
    for shard in status(run):
        os.kill(shard.pid, signal.SIGKILL)
    assert RayDirectory().variables(run)["THRESHER_SHARDS"] == "ray://secret/0,ray://secret/1"


def test_tls_and_token_work_between_actors_as_anywhere(run: str) -> None:
    """A worker that knows its rank and the run's name trains."""

    @ray.remote(num_cpus=0)
    def work() -> int:
        with connect(
            settings=settings_from({"THRESHER_RANK": "0", "THRESHER_WORKERS": "1"}, addresses=f"ray://{run}")
        ) as session:
            model = torch.nn.Linear(2, 1)
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
            session.wrap(model, optimizer)
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.ones(1, 2)).sum().backward()
                optimizer.step()
            return session.step

    assert ray.get(work.remote(), timeout=SECONDS) == 3
    assert [one.version for one in status(run)] == [3, 3]


@pytest.mark.parametrize("lacking", ["certificate", "token"])
def test_who_lacks_certificate_or_token_is_not_let_in(run: str, lacking: str) -> None:
    """Though a name leads them to the shard; with both they are."""
    told = settings_from({"THRESHER_RANK": "0", "THRESHER_WORKERS": "1"}, addresses=f"ray://{run}").credentials
    assert told.tls is not None
    without = {
        "certificate": (Credentials(TlsFiles(told.tls.ca), told.token_file), ShardLostError, "cannot be reached"),
        "token": (Credentials(told.tls), ConfigurationError, "asks for a token"),
    }
    shown, error, said = without[lacking]
    for credentials, refused in ((told, nullcontext()), (shown, pytest.raises(error, match=said))):
        calls = ShardCalls(0, RayDirectory().locate(run, 0), "the test", credentials=credentials)
        try:
            with refused:
                calls.statistics(timeout=SECONDS if credentials is told else 5.0)
        finally:
            calls.close()
