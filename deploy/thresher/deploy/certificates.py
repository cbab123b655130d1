"""A certificate authority for trying mTLS out: one for the run, one certificate for each shard, worker and reader.

For a cluster that has an authority, ask that one; `docs/security.md` says what a certificate has to hold.
"""

import datetime as dt
import ipaddress
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from thresher.protos.errors import ConfigurationError

LOOPBACK_HOSTS: Final = ("localhost", "127.0.0.1", "::1")
"""What a shard's certificate is always good for, whatever hosts are named."""

_EARLIER: Final = dt.timedelta(minutes=10)  # the clocks of a cluster are not equal
_MOST_DAYS: Final = 36_500  # a year of five digits cannot be written into a certificate


@final
@dataclass(frozen=True, slots=True)
class _Pair:
    """A certificate and its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def write_certificates(
    folder: Path, hosts: Sequence[str] = (), workers: int = 1, days: int = 30
) -> dict[str, tuple[Path, Path]]:
    """Make an authority and what it signs: ``shard``, ``worker-0`` …, ``observer`` and ``operator``.

    Everybody gets ``NAME.pem`` and ``NAME.key``, the authority too (``ca``). The organizational unit of a certificate
    is its role; a shard's names its hosts. Keys are of the curve P-256 and readable by their owner alone.

    Args:
        folder: Where they go; made where it is missing.
        hosts: Names and IP addresses by which the shards are reached, beside `LOOPBACK_HOSTS`.
        workers: Number of workers, >= 1.
        days: How long the certificates are good for, >= 1.

    Returns:
        Paths of certificate and key, by name.

    Raises:
        ConfigurationError: when a number is out of its range, a host is none, one of the files exists already, or
            they cannot be written.
    """
    if workers < 1 or not 1 <= days <= _MOST_DAYS:
        raise ConfigurationError(f"certificates for {workers} workers and {days} days make no sense; both start at 1")
    names = [_host(host) for host in dict.fromkeys((*hosts, *LOOPBACK_HOSTS))]
    roles = {"shard": "shard", **{f"worker-{rank}": "worker" for rank in range(workers)}}
    roles |= {"observer": "observer", "operator": "operator"}
    paths = {name: (folder / f"{name}.pem", folder / f"{name}.key") for name in ("ca", *roles)}
    _make_room(folder, (path for pair in paths.values() for path in pair))

    authority = _authority(days)
    made = {"ca": authority}
    for name, role in roles.items():
        made[name] = _issued(authority, name, role, names if role == "shard" else [], days)
    for name, pair in made.items():
        _write(paths[name], pair)
    return paths


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        pass
    if not text or not text.isascii() or not text.isprintable() or set(text) & set(" :/[]"):
        raise ConfigurationError(f"{text!r} is no host; name hosts or IP addresses, without port or brackets")
    return x509.DNSName(text)


def _make_room(folder: Path, paths: Iterable[Path]) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"{folder} cannot be made: {error.strerror}; choose another folder") from None
    taken = [str(path) for path in paths if os.path.lexists(path)]
    if taken:
        raise ConfigurationError(
            f"{', '.join(taken)} exists already, and keys are never overwritten; choose another folder"
        )


def _authority(days: int) -> _Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Thresher test CA")])
    builder = (
        _builder(name, name, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
    )
    return _Pair(builder.sign(key, hashes.SHA256()), key)


def _issued(authority: _Pair, name: str, role: str, hosts: list[x509.GeneralName], days: int) -> _Pair:
    """Sign a certificate: a server's where there are hosts, a client's otherwise. Neither is good for the other."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
    issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    builder = (
        _builder(subject, authority.certificate.subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(issuer_key, critical=False)
    )
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName(hosts), critical=False)
    return _Pair(builder.sign(authority.key, hashes.SHA256()), key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(now + dt.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _write(paths: tuple[Path, Path], pair: _Pair) -> None:
    certificate, key = paths
    secret = pair.key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    _write_new(key, secret, 0o600)
    _write_new(certificate, pair.certificate.public_bytes(serialization.Encoding.PEM), 0o644)


def _write_new(path: Path, data: bytes, mode: int) -> None:
    """Write a file that must not exist, readable by whom ``mode`` says from its first byte on."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror}") from None
