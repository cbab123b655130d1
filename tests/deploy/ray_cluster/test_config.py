"""What a run on Ray is told is checked as a whole, and reaches shards and workers."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.deploy.certificates import write_certificates
from thresher.deploy.ray_cluster.config import RayConfig, TlsPaths
from thresher.protos.consistency import Consistency
from thresher.protos.errors import ConfigurationError
from thresher.worker import Method
from thresher.worker.settings import Settings, settings_from

SHARED = Path("/shared/run")
PLAIN = RayConfig("digits", 2, 3, state_dir=SHARED)

configs = st.builds(
    RayConfig,
    name=st.from_regex(r"[A-Za-z0-9._-]{1,100}", fullmatch=True),
    shards=st.integers(1, 9),
    workers=st.just(0) | st.integers(2, 9),
    method=st.sampled_from(
        [Method(density=0.1), Method("TopK(0.1)"), Method(threshold=0.5, placement="update", period=4)]
    ),
    consistency=st.sampled_from(
        [Consistency(), Consistency(quorum=2, grace=0.1), Consistency("ssp", staleness=3), Consistency("async")]
    ),
    seed=st.integers(0, 2**40),
    durability=st.sampled_from(["process", "disk"]),
    state_dir=st.just(SHARED),
    worker_state_dir=st.sampled_from([None, Path("/local")]),
    cpus=st.floats(0.01, 64),
    strict_spread=st.booleans(),
    start_timeout=st.floats(0, 1e6),
    round_timeout=st.floats(1e6, 1e9),
    lease=st.floats(1, 1e6),
    checkpoint_every=st.integers(0, 1000),
    checkpoints=st.integers(1, 9),
    insecure=st.booleans(),
)


def told(config: RayConfig, rank: int = 1) -> Settings:
    """What a worker reads that has the run's variables, and knows its rank and how many are started."""
    return settings_from({"THRESHER_WORKERS": "9", **config.variables(), "THRESHER_RANK": str(rank)})


@given(configs)
def test_workers_read_what_the_run_is(config: RayConfig) -> None:
    """All that concerns them; no variable is that of one worker alone, nor a number that nobody knows yet."""
    assert "THRESHER_RANK" not in config.variables()
    assert ("THRESHER_WORKERS" in config.variables()) == (config.workers > 0)
    settings = told(config)
    assert (settings.method, settings.consistency, settings.seed) == (config.method, config.consistency, config.seed)
    assert settings.addresses == tuple(f"ray://{config.name}/{shard}" for shard in range(config.shards))
    assert (settings.workers, settings.insecure) == (config.workers or 9, config.insecure)
    assert settings.state_dir == (config.worker_state_dir or SHARED / "workers")
    assert settings.state_is_local == (config.worker_state_dir is not None)
    assert settings.state_sync == (config.durability == "disk")
    assert settings.reconnect_timeout >= config.lease


@given(configs, st.sampled_from(["127.0.0.1", "10.0.0.7", "::1"]))
def test_shards_are_told_what_the_run_is(config: RayConfig, host: str) -> None:
    """Each has a folder of its own, and serves at free ports of its node."""
    servers = [config.server(shard, host) for shard in range(config.shards)]
    assert len({server.state_dir for server in servers}) == config.shards
    for shard, server in enumerate(servers):
        assert server.listen == server.metrics_listen
        assert server.listen in (f"{host}:0", f"[{host}]:0")
        assert (server.shard.shard, server.shard.shards, server.shard.workers) == (shard, config.shards, config.workers)
        assert (server.shard.lease, server.shard.round_timeout) == (config.lease, config.round_timeout)
        assert (server.sync, server.checkpoints) == (config.durability == "disk", config.checkpoints)
        assert server.insecure == config.insecure


def test_a_run_that_keeps_nothing_has_no_folder() -> None:
    config = RayConfig("digits", durability="none")
    assert config.server(0, "127.0.0.1").state_dir is None
    assert told(config, 0).state_dir is None


def test_certificates_and_tokens_reach_whom_they_are_for(tmp_path: Path) -> None:
    """Shards show theirs, workers theirs."""
    paths = write_certificates(tmp_path / "certificates")
    (tmp_path / "tokens").write_text(f"worker {'w' * 32}\n", encoding="utf-8")
    (tmp_path / "token").write_text("w" * 32, encoding="utf-8")
    ca, shown = paths["ca"][0], {name: TlsPaths(paths["ca"][0], *paths[name]) for name in ("shard", "worker-0")}
    config = replace(
        PLAIN, tls=shown["shard"], tokens=tmp_path / "tokens", worker_tls=shown["worker-0"],
        worker_token_file=tmp_path / "token",
    )  # fmt: skip
    server, credentials = config.server(0, "127.0.0.1"), told(config).credentials
    assert (server.tls, server.tokens) == (shown["shard"].read(), tmp_path / "tokens")
    assert (credentials.tls, credentials.token_file) == (shown["worker-0"].read(), tmp_path / "token")
    secrets = [path.read_bytes() for path in (tmp_path / "token", *paths["shard"], *paths["worker-0"])]
    assert not [secret for secret in secrets if secret in pickle.dumps(config)], "Ray keeps what an actor is made with"
    assert ca.exists()


def test_no_certificate_or_token_is_read_where_a_run_is_started() -> None:
    """Shards and workers have them, and who starts the run need not: it says where they will be found."""
    shard, worker = (TlsPaths(*(Path(f"/on/{node}/{name}") for name in ("ca", "cert", "key"))) for node in "sw")
    config = replace(PLAIN, tls=shard, tokens=Path("/s/tokens"), worker_tls=worker, worker_token_file=Path("/w/token"))
    variables = config.variables()
    assert [variables[f"THRESHER_TLS_{name}"] for name in ("CA", "CERT", "KEY")] == [
        "/on/w/ca",
        "/on/w/cert",
        "/on/w/key",
    ]
    assert Path(variables["THRESHER_TOKEN_FILE"]) == config.worker_token_file
    with pytest.raises(ConfigurationError, match="/on/s/"):  # on a node that should have it
        config.server(0, "127.0.0.1")


PEM = Path("/pem")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tls": TlsPaths(PEM)}, "a shard that speaks TLS shows a certificate"),
        ({"tls": TlsPaths(None, PEM, PEM)}, "anybody could call"),
        ({"worker_tls": TlsPaths(None, PEM, PEM)}, "name --worker-tls-ca"),
        ({"worker_tls": TlsPaths(Path("ca.pem"))}, "write the whole path"),
        ({"tokens": Path("tokens")}, "write the whole path"),
        ({"worker_token_file": Path("token")}, "write the whole path"),
    ],
)
def test_tls_that_cannot_work_is_refused_without_the_files(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        replace(PLAIN, **change)


@pytest.mark.parametrize(
    ("paths", "message"), [((PEM, PEM), "go together"), ((PEM, None, PEM), "go together"), ((), "TLS needs")]
)
def test_half_of_a_pair_is_none(paths: tuple[Path | None, ...], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        TlsPaths(*paths)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": ""}, "is no name of a run"),
        ({"name": "two words"}, "is no name of a run"),
        ({"name": "a/b"}, "is no name of a run"),
        ({"name": "x" * 101}, "is no name of a run"),
        ({"shards": 0}, "at least one shard"),
        ({"workers": -1}, "no negative number of workers"),
        ({"cpus": 0}, "CPUs of a shard"),
        ({"cpus": float("nan")}, "CPUs of a shard"),
        ({"checkpoints": 0}, "at least 1 checkpoint"),
        ({"checkpoint_every": -1}, "must not be negative"),
        ({"lease": 100.0, "round_timeout": 10.0}, "lease of 100 s is longer"),
        ({"start_timeout": -1.0}, "start timeout must be finite"),
        ({"consistency": Consistency(quorum=4, grace=0.1)}, "a quorum of 4 is more than 3 workers"),
        ({"method": Method(budget=10**9, steps=10), "consistency": Consistency("async")}, "a budget in bytes"),
        ({"durability": "much"}, "durability is one of"),
        ({"durability": "none"}, "keeps nothing in /shared/run"),
        ({"state_dir": None}, "name --state-dir"),
        ({"state_dir": Path("runs/x")}, "write the whole path"),
        ({"worker_state_dir": Path("runs/x")}, "write the whole path"),
    ],
)
def test_what_makes_no_sense_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        replace(PLAIN, **change)
