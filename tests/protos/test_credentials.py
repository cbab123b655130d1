"""Files of secrets: what can be one is taken, what cannot is told by its path, and no text ever has the secret."""

import logging
import re
import string
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.deploy.certificates import write_certificates
from thresher.protos.credentials import LEAST_TOKEN_CHARACTERS, NO_CREDENTIALS, Credentials, TlsFiles, checked_token
from thresher.protos.errors import ConfigurationError

TOKEN = "correct-horse-battery-staple-0123456789"  # noqa: S105 - one for tests
Files = dict[str, tuple[Path, Path]]

tokens = st.from_regex(r"[A-Za-z0-9._~+/-]{32,100}={0,2}", fullmatch=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Certificates of one authority."""
    return write_certificates(tmp_path_factory.mktemp("certificates"))


def secret_file(folder: Path, content: str | bytes) -> Path:
    path = folder / "token"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(0o600)
    return path


@given(token=tokens, end=st.sampled_from(["", "\n", "\r\n", "\n\n"]))
def test_a_token_is_read_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, token: str, end: str) -> None:
    """Whatever an editor puts behind it; and neither the value nor its text holds it."""
    credentials = Credentials(token_file=secret_file(tmp_path_factory.getbasetemp(), token + end))
    assert credentials.token() == token
    assert token not in repr(credentials)


@given(text=st.text(string.printable, min_size=1).filter(lambda text: not re.fullmatch(r"[A-Za-z0-9._~+/-]+=*", text)))
def test_what_no_header_carries_is_no_token(text: str) -> None:
    """Nothing that could end a header, or begin another, passes; the message does not repeat it."""
    token = text + TOKEN
    if re.fullmatch(r"[A-Za-z0-9._~+/-]+=*", token):
        token = "\n" + token
    with pytest.raises(ConfigurationError) as raised:
        checked_token(token, "somewhere")
    assert TOKEN not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", "must hold one line, the token; it has 0"),
        ("\n \n", "must hold one line, the token; it has 0"),
        (f"{TOKEN}\n{TOKEN}", "must hold one line, the token; it has 2"),
        ("x" * (LEAST_TOKEN_CHARACTERS - 1), "has 31 characters and could be guessed"),
        (f"Bearer {TOKEN}", "has characters beside letters"),
        (f"{TOKEN}\x00", "has characters beside letters"),
        (f"{TOKEN}é", "no ASCII text"),
        (b"\xff" * 40, "no ASCII text"),
        ("x" * (2 << 20), "is longer than"),
    ],
)
def test_a_file_that_is_no_token_is_named(tmp_path: Path, content: str | bytes, text: str) -> None:
    """The path and what is wrong with it, never what is in it; nor is that in the exceptions behind the error."""
    path = secret_file(tmp_path, content)
    with pytest.raises(ConfigurationError, match=text) as raised:
        Credentials(token_file=path)
    assert str(path) in str(raised.value)
    assert TOKEN not in str(raised.value)
    assert raised.value.__suppress_context__ or raised.value.__context__ is None


@pytest.mark.parametrize("make", [lambda path: Credentials(token_file=path), lambda path: TlsFiles(ca=path)])
@pytest.mark.parametrize(("name", "text"), [("missing", "No such file"), (".", "Is a directory")])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, make: type[Credentials], name: str, text: str) -> None:
    """A configuration error with path and reason."""
    with pytest.raises(ConfigurationError, match=f"cannot be read: {text}"):
        make(tmp_path / name)  # type: ignore[arg-type]  # both take a path


def test_a_token_may_change_while_the_program_runs(tmp_path: Path) -> None:
    """The file is read where the token is used; what it holds by then is checked again."""
    credentials = Credentials(token_file=secret_file(tmp_path, TOKEN))
    secret_file(tmp_path, TOKEN[::-1])
    assert credentials.token() == TOKEN[::-1]
    secret_file(tmp_path, "short")
    with pytest.raises(ConfigurationError, match="could be guessed"):
        credentials.token()


def test_without_credentials_nothing_is_shown() -> None:
    """The default of loopback."""
    assert NO_CREDENTIALS.tls is None
    assert NO_CREDENTIALS.token() is None


def test_files_are_read_in_the_order_that_grpc_takes_them(files: Files) -> None:
    """Authority, key, certificate; None for what is not named."""
    (ca, _), (certificate, key) = files["ca"], files["worker-0"]
    assert TlsFiles(ca, certificate, key).read() == (ca.read_bytes(), key.read_bytes(), certificate.read_bytes())
    assert TlsFiles(ca).read() == (ca.read_bytes(), None, None)
    assert TlsFiles(None, certificate, key).read() == (None, key.read_bytes(), certificate.read_bytes())


def test_files_that_do_not_go_together_are_refused(files: Files, tmp_path: Path) -> None:
    """Each wrong combination has a message of its own; none has a part of a key."""
    (ca, _), (certificate, key), (_, other) = files["ca"], files["worker-0"], files["shard"]
    locked = tmp_path / "locked.key"
    seal = ["openssl", "ec", "-in", str(key), "-aes128", "-passout", "pass:hello", "-out", str(locked)]
    subprocess.run(seal, check=True, capture_output=True)
    wrong: list[tuple[tuple[Path | None, Path | None, Path | None], str]] = [
        ((None, None, None), "an authority to trust, a certificate to show"),
        ((ca, certificate, None), "go together"),
        ((ca, None, key), "go together"),
        ((ca, certificate, other), "KEY_VALUES_MISMATCH"),
        ((ca, key, key), "not a PEM certificate and its private key"),
        ((ca, certificate, certificate), "not a PEM certificate and its private key"),
        ((ca, certificate, locked), "without passphrase"),
        ((key, None, None), "is not a PEM file of certificates"),
    ]
    secret = key.read_text(encoding="ascii").splitlines()[1]
    for paths, text in wrong:
        with pytest.raises(ConfigurationError, match=text) as raised:
            TlsFiles(*paths)
        assert secret not in str(raised.value)


def test_who_calls_must_know_the_authority(files: Files) -> None:
    """A certificate to show is not enough: the shard has to be recognised too."""
    with pytest.raises(ConfigurationError, match="THRESHER_TLS_CA"):
        Credentials(TlsFiles(None, *files["worker-0"]))


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o640, True), (0o604, True)])
def test_a_secret_that_others_may_read_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, files: Files, mode: int, warned: bool
) -> None:
    """For a token and for a key; the warning says which file and what to do, not what is in it."""
    token = secret_file(tmp_path, TOKEN)
    key = tmp_path / "key"
    key.write_bytes(files["worker-0"][1].read_bytes())
    for path in (token, key):
        path.chmod(mode)
    with caplog.at_level(logging.DEBUG):
        Credentials(TlsFiles(files["ca"][0], files["worker-0"][0], key), token)
    told = [f"{path} holds a secret and other users may read it; chmod 600 it" for path in (key, token)]
    assert caplog.messages == (told if warned else [])
