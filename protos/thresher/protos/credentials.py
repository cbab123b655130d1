"""What one end of a connection shows and trusts: paths of files, never the secrets in them.

Secrets are read where they are used and are part of no value, so that no `repr`, log or error can tell them.
"""

import logging
import re
import ssl
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from thresher.protos.errors import ConfigurationError

LEAST_TOKEN_CHARACTERS: Final = 32
"""A shorter token could be guessed: 32 characters of base64 are 192 bits."""

_MOST_BYTES: Final = 1 << 20  # no such file is longer; a wrong path may be a model or a device
_TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # what RFC 6750 allows behind "Bearer "

_logger = logging.getLogger(__name__)


def check_named(ca: Path | None, certificate: Path | None, key: Path | None) -> None:
    """Refuse what cannot be one end of TLS, whatever is in the files.

    Raises:
        ConfigurationError: when there is a certificate without key or the reverse, or neither certificate nor ``ca``.
    """
    if (certificate is None) != (key is None):
        raise ConfigurationError("a certificate and its private key go together; name both or neither")
    if ca is None and certificate is None:
        raise ConfigurationError("TLS needs an authority to trust, a certificate to show with its key, or both")


@final
@dataclass(frozen=True, slots=True)
class TlsFiles:
    """The PEM files of one end of TLS. With all three both ends show a certificate: mTLS.

    Attributes:
        ca: Certificates of the authorities that the other end's certificate must come from.
        certificate: This end's certificate, with those between it and the authority.
        key: The private key of ``certificate``, without a passphrase.

    Raises:
        ConfigurationError: when there is a certificate without key or the reverse, or neither certificate nor ``ca``;
            when a file is missing, unreadable, not PEM, or the key is another certificate's.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        """Read everything once, so that a wrong file is told now and not by a handshake."""
        check_named(self.ca, self.certificate, self.key)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if self.ca is not None:
            _check_authority(context, self.ca)
        if self.certificate is not None and self.key is not None:
            _check_pair(context, self.certificate, self.key)

    def read(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """Return the contents of ``ca``, ``key`` and ``certificate``; None for what is not named.

        Raises:
            ConfigurationError: when a file can no longer be read.
        """
        ca, key, certificate = (None if path is None else _read(path) for path in (self.ca, self.key, self.certificate))
        return ca, key, certificate


@final
@dataclass(frozen=True, slots=True)
class Credentials:
    """What a worker, or whoever else calls a shard, shows and trusts. Without any: plain text, and no name.

    Attributes:
        tls: Files of TLS; ``ca`` must be among them, because a shard is known by who has signed its certificate.
        token_file: File whose one line is the bearer token.

    Raises:
        ConfigurationError: when TLS has no ``ca``, or the file does not hold one token.
    """

    tls: TlsFiles | None = None
    token_file: Path | None = None

    def __post_init__(self) -> None:
        """Read the token once, so that a wrong file is told before anything is sent."""
        if self.tls is not None and self.tls.ca is None:
            raise ConfigurationError(
                "to trust a shard takes the authority that signed its certificate; set THRESHER_TLS_CA"
            )
        self.token()
        if self.token_file is not None:
            warn_if_open(self.token_file)

    def token(self) -> str | None:
        """Return the bearer token as its file has it now; None without a file.

        Raises:
            ConfigurationError: when the file does not hold one token.
        """
        if self.token_file is None:
            return None
        lines = secret_lines(self.token_file)
        if len(lines) != 1:
            raise ConfigurationError(f"{self.token_file} must hold one line, the token; it has {len(lines)}")
        return checked_token(lines[0], str(self.token_file))


NO_CREDENTIALS: Final = Credentials()
"""Plain text and no name: what loopback needs."""


def secret_lines(path: Path) -> list[str]:
    """Return the lines of a text file of secrets, without empty ones.

    Raises:
        ConfigurationError: when it cannot be read or is no ASCII text; the message has the path, never the content.
    """
    try:
        text = _read(path).decode("ascii")
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path} is not a file of tokens: it is no ASCII text") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def checked_token(token: str, where: str) -> str:
    """Return ``token`` when it can be one.

    Raises:
        ConfigurationError: when it is too short, or has characters that a header cannot carry; the message has
            ``where``, never the token.
    """
    if len(token) < LEAST_TOKEN_CHARACTERS:
        raise ConfigurationError(
            f"the token in {where} has {len(token)} characters and could be guessed; at least "
            f"{LEAST_TOKEN_CHARACTERS} are asked for: `openssl rand -base64 32` makes one"
        )
    if not _TOKEN.fullmatch(token):
        raise ConfigurationError(f"the token in {where} has characters beside letters, digits and -._~+/=")
    return token


def warn_if_open(path: Path) -> None:
    """Warn of a secret that other users can read; a container's mounted secret may be so on purpose."""
    if path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        _logger.warning("%s holds a secret and other users may read it; chmod 600 it", path)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > _MOST_BYTES:
        raise ConfigurationError(f"{path} is longer than {_MOST_BYTES} bytes: that is no certificate, key or token")
    return data


def _check_authority(context: ssl.SSLContext, ca: Path) -> None:
    _read(ca)
    try:
        context.load_verify_locations(ca)
    except ssl.SSLError:
        raise ConfigurationError(f"{ca} is not a PEM file of certificates") from None


def _check_pair(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    for path in (certificate, key):
        _read(path)
    try:
        context.load_cert_chain(certificate, key, password="")  # or OpenSSL would ask the terminal
    except ssl.SSLError as error:
        raise ConfigurationError(
            f"{certificate} and {key} are not a PEM certificate and its private key without passphrase "
            f"({error.reason or 'unreadable'})"
        ) from None
    warn_if_open(key)
