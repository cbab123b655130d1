"""Served shards against callers of every kind: what each of them may, and that no secret is told on the way."""

import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from grpc_health.v1 import health_pb2, health_pb2_grpc

from thresher.deploy import certificates
from thresher.protos.credentials import NO_CREDENTIALS, Credentials, TlsFiles
from thresher.protos.errors import ConfigurationError
from thresher.protos.transport import MESSAGE_BYTES, channel
from thresher.server.authorization import LEAST_ROLES, Role
from thresher.server.config import ShardConfig
from thresher.server.server import ServerConfig, ShardServer
from thresher.v1 import aggregation_pb2 as pb
from thresher.v1.aggregation_pb2_grpc import AggregationServiceStub
from thresher.worker import Method, Settings
from thresher.worker.settings import settings_from

CODE = grpc.StatusCode
ALONE = ServerConfig(ShardConfig(shard=0, shards=1, workers=1))
TOKENS = {role: f"token-of-the-{role.name.lower()}-" + "0123456789abcdef" * 2 for role in Role}
WORD = {role: role.name.lower() for role in Role}


@dataclass(frozen=True)
class Vault:
    """Everything that a caller may show: right, wrong, and a stranger's."""

    folder: Path
    pairs: dict[str, tuple[Path, Path]]

    @property
    def ca(self) -> Path:
        return self.pairs["ca"][0]

    def tls(self, name: str) -> TlsFiles:
        return TlsFiles(self.ca, *self.pairs[name])

    def token(self, name: str) -> Path:
        return self.folder / f"{name}.token"

    @property
    def secrets(self) -> list[str]:
        keys = [key.read_text(encoding="ascii").splitlines()[1] for _, key in self.pairs.values()]
        return [*keys, *TOKENS.values(), self.token("wrong").read_text(encoding="ascii")]


@pytest.fixture(scope="module")
def vault(tmp_path_factory: pytest.TempPathFactory) -> Vault:
    """One authority with all roles and a certificate without one; another authority with a worker of its own."""
    folder = tmp_path_factory.mktemp("vault")
    pairs = certificates.write_certificates(folder)
    strangers = certificates.write_certificates(folder / "strangers")
    pairs |= {"stranger": strangers["worker-0"], "strange ca": strangers["ca"]}
    key: Any = load_pem_private_key(pairs["ca"][1].read_bytes(), None)
    authority = certificates._Pair(x509.load_pem_x509_certificate(pairs["ca"][0].read_bytes()), key)
    pairs["nobody"] = folder / "nobody.pem", folder / "nobody.key"
    certificates._write(pairs["nobody"], certificates._issued(authority, "nobody", "visitor", [], days=1))
    entries = {**{WORD[role]: token for role, token in TOKENS.items()}, "wrong": "x" * 40}
    for name, token in entries.items():
        path = folder / f"{name}.token"
        path.touch(mode=0o600)
        path.write_text(token, encoding="ascii")
    (folder / "tokens").touch(mode=0o600)
    (folder / "tokens").write_text("\n".join(f"{WORD[role]} {token}" for role, token in TOKENS.items()), "ascii")
    return Vault(folder, pairs)


def serving(config: ServerConfig, use: Callable[[str], None]) -> None:
    """Serve a shard, and use its address on another thread."""

    async def scenario() -> None:
        server = ShardServer(config)
        await server.start()
        try:
            await asyncio.to_thread(use, server.address)
        finally:
            await server.stop(grace=0.1)

    asyncio.run(scenario())


def calls(opened: grpc.Channel) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every method of the service with the least that can be said to it."""
    stub = AggregationServiceStub(opened)
    yield "Register", lambda: stub.Register(pb.RegisterRequest(), timeout=20)
    yield "Seed", lambda: stub.Seed(iter(()), timeout=20)
    yield "Snapshot", lambda: list(stub.Snapshot(pb.SnapshotRequest(wait_seconds=0), timeout=20))
    yield "Exchange", lambda: list(stub.Exchange(iter(()), timeout=20))
    yield "Statistics", lambda: stub.Statistics(pb.StatisticsRequest(), timeout=20)
    yield "Measure", lambda: list(stub.Measure(iter(()), timeout=20))


def refused(address: str, credentials: Credentials) -> tuple[dict[str, grpc.StatusCode], str]:
    """Call every method: who was turned away before the shard itself answered, with what, and all that was told."""
    codes: dict[str, grpc.StatusCode] = {}
    told = [repr(credentials)]
    with channel(address, credentials) as opened:
        for name, call in calls(opened):
            try:
                call()
            except grpc.RpcError as error:
                failed: Any = error
                told += [repr(failed), failed.details()]
                if failed.code() in (CODE.UNAUTHENTICATED, CODE.PERMISSION_DENIED, CODE.UNAVAILABLE):
                    codes[name] = failed.code()
    return codes, "\n".join(told)


METHODS = {method.rpartition("/")[2]: least for method, least in LEAST_ROLES.items()}


def turned_away(role: Role) -> dict[str, grpc.StatusCode]:
    """What must happen to a role."""
    return {name: CODE.PERMISSION_DENIED for name, least in METHODS.items() if role < least}


def everything(code: grpc.StatusCode) -> dict[str, grpc.StatusCode]:
    return dict.fromkeys(METHODS, code)


def callers(vault: Vault, kind: str) -> dict[str, tuple[Credentials, dict[str, grpc.StatusCode]]]:
    """Whoever may try, and which methods they must be refused, on a shard of that kind."""
    only_ca = TlsFiles(vault.ca)
    tls = None if kind == "tokens" else only_ca
    unknown, cut = everything(CODE.UNAUTHENTICATED), everything(CODE.UNAVAILABLE)
    by_token = {name: Credentials(tls, vault.token(name)) for name in (*WORD.values(), "wrong")}
    if kind in {"tokens", "tls and tokens"}:
        return {
            "nobody": (Credentials(tls), unknown),
            "wrong token": (by_token["wrong"], unknown),
            **{WORD[role]: (by_token[WORD[role]], turned_away(role)) for role in Role},
        }
    own = {Role.OBSERVER: "observer", Role.WORKER: "worker-0", Role.OPERATOR: "operator"}
    cases = {
        "plain text": (NO_CREDENTIALS, cut),
        "plain text and token": (Credentials(token_file=vault.token("operator")), cut),
        "no certificate": (by_token["operator"], cut),
        "other authority": (Credentials(TlsFiles(vault.ca, *vault.pairs["stranger"]), vault.token("operator")), cut),
        "shard's own": (Credentials(vault.tls("shard"), vault.token("operator")), cut),
        "distrusts": (Credentials(TlsFiles(vault.pairs["strange ca"][0], *vault.pairs["operator"])), cut),
        "no role": (Credentials(vault.tls("nobody"), vault.token("operator")), unknown),
    }
    if kind == "certificates":
        return cases | {WORD[role]: (Credentials(vault.tls(own[role])), turned_away(role)) for role in Role}
    return cases | {
        "certificate only": (Credentials(vault.tls("operator")), unknown),
        "wrong token": (Credentials(vault.tls("operator"), vault.token("wrong")), unknown),
        **{
            f"{name} with the {WORD[by]}'s token": (
                Credentials(vault.tls(name), vault.token(WORD[by])),
                turned_away(min(role, by)),
            )
            for role, name in own.items()
            for by in Role
        },
    }


@pytest.mark.parametrize("kind", ["tokens", "tls and tokens", "certificates", "certificates and tokens"])
def test_every_method_asks_who_is_calling(
    vault: Vault, kind: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each caller gets exactly what its role may, of two roles the lower; and nobody is told a secret anywhere."""
    tls = TlsFiles(vault.ca if "certificates" in kind else None, *vault.pairs["shard"]) if kind != "tokens" else None
    config = replace(ALONE, tls=tls, tokens=vault.folder / "tokens" if "tokens" in kind else None)
    told = [repr(config)]

    def use(address: str) -> None:
        for who, (credentials, expected) in callers(vault, kind).items():
            codes, words = refused(address, credentials)
            assert codes == expected, who
            told.append(words)

    with caplog.at_level(logging.DEBUG):
        serving(config, use)
    everywhere = "\n".join([*told, caplog.text, *capfd.readouterr()])
    assert [secret for secret in vault.secrets if secret in everywhere] == []
    assert str(vault.ca) in everywhere or kind == "tokens", "the paths are no secrets"


def test_loopback_is_open_by_default() -> None:
    """Without any configuration everybody on this machine may call everything."""

    def use(address: str) -> None:
        assert refused(address, NO_CREDENTIALS)[0] == {}

    serving(ALONE, use)


def test_a_caller_with_tls_does_not_fall_back_to_plain_text(vault: Vault) -> None:
    """A shard in plain text is not the one that was asked for."""

    def use(address: str) -> None:
        assert refused(address, Credentials(vault.tls("worker-0")))[0] == everything(CODE.UNAVAILABLE)

    serving(ALONE, use)


@pytest.mark.parametrize("names", [(), ("ca",), ("token",), ("ca", "pair"), ("ca", "pair", "token")])
def test_a_worker_finds_its_credentials_in_the_environment(vault: Vault, names: tuple[str, ...]) -> None:
    """Paths only: settings_from(s.environment()) == s, and no secret is in a variable."""
    pair = vault.pairs["worker-0"] if "pair" in names else (None, None)
    tls = TlsFiles(vault.ca, *pair) if "ca" in names else None
    credentials = Credentials(tls, vault.token("worker") if "token" in names else None)
    settings = Settings(("127.0.0.1:1",), 0, 1, method=Method(threshold=0.0), credentials=credentials)
    environment = settings.environment()
    assert settings_from(environment) == settings
    assert not set(vault.secrets) & set(environment.values())
    assert sum(name.startswith(("THRESHER_TLS", "THRESHER_TOKEN")) for name in environment) == len(names) + (
        "pair" in names
    )


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_probe_needs_no_token(vault: Vault, encrypted: bool) -> None:
    """Health is told to whom can connect."""
    shard = TlsFiles(None, *vault.pairs["shard"]) if encrypted else None
    caller = Credentials(TlsFiles(vault.ca) if encrypted else None)

    def use(address: str) -> None:
        with channel(address, caller) as opened:
            probe: Any = health_pb2_grpc.HealthStub(opened)
            answer = probe.Check(health_pb2.HealthCheckRequest(), timeout=20)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING

    serving(replace(ALONE, tls=shard, tokens=vault.folder / "tokens"), use)


def test_what_is_too_long_is_refused_unread() -> None:
    """A message beyond its bound, and headers beyond theirs; the shard goes on."""

    def use(address: str) -> None:
        with channel(address) as opened:
            stub = AggregationServiceStub(opened)
            long = pb.RegisterRequest(origin="x" * MESSAGE_BYTES)
            with pytest.raises(grpc.RpcError, match="larger than max"):
                stub.Register(long, timeout=20)
            with pytest.raises(grpc.RpcError, match="RESOURCE_EXHAUSTED"):
                stub.Statistics(pb.StatisticsRequest(), metadata=(("x", "x" * (20 << 10)),), timeout=20)
            assert stub.Statistics(pb.StatisticsRequest(), timeout=20).version == 0

    serving(ALONE, use)


def test_a_network_takes_tls_and_somebody_to_ask_for(vault: Vault) -> None:
    """Beyond this machine neither plain text with a token nor TLS that anybody may use is served unasked."""
    pair, tokens = vault.pairs["shard"], vault.folder / "tokens"
    far = replace(ALONE, listen="0.0.0.0:0")
    with pytest.raises(ConfigurationError, match=r"--tls-cert.*--insecure"):
        ShardServer(replace(far, tokens=tokens))
    with pytest.raises(ConfigurationError, match="anybody could call"):
        replace(far, tls=TlsFiles(None, *pair))
    with pytest.raises(ConfigurationError, match="shows a certificate"):
        replace(far, tls=TlsFiles(vault.ca))
    ShardServer(replace(far, tokens=tokens, insecure=True))

    def use(address: str) -> None:
        port = address.rpartition(":")[2]
        assert refused(f"localhost:{port}", Credentials(vault.tls("worker-0")))[0] == {}

    serving(replace(far, tls=TlsFiles(vault.ca, *pair)), use)


def test_the_command_line_serves_what_it_was_told(vault: Vault) -> None:
    """`thresher serve` with the files of `thresher certs`: the worker gets in, the one without a token does not."""
    certificate, key = vault.pairs["shard"]
    options = ["--tls-ca", vault.ca, "--tls-cert", certificate, "--tls-key", key, "--tokens", vault.folder / "tokens"]
    served = subprocess.Popen(
        [sys.executable, "-m", "thresher.deploy", "serve", "--until-stdin-closes", *map(str, options)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert served.stdout is not None
        address = json.loads(served.stdout.readline())["address"]
        assert refused(address, Credentials(vault.tls("worker-0"), vault.token("worker")))[0] == {}
        assert refused(address, Credentials(vault.tls("worker-0")))[0] == everything(CODE.UNAUTHENTICATED)
    finally:
        served.communicate(timeout=30)
    assert served.returncode == 0
