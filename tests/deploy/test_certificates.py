"""Certificates for a trial: who signs what, for whom, for how long; and nothing is ever overwritten."""

import datetime as dt
import ipaddress
import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from thresher.deploy.certificates import LOOPBACK_HOSTS, write_certificates
from thresher.deploy.cli import app
from thresher.protos.credentials import TlsFiles
from thresher.protos.errors import ConfigurationError

runner = CliRunner()


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


names = st.from_regex(r"[a-z][a-z0-9-]{0,20}(\.[a-z]{1,5})?", fullmatch=True)
hosts = st.lists(names | st.ip_addresses().map(str), max_size=4)


@settings(max_examples=15)
@given(hosts=hosts, workers=st.integers(1, 3), days=st.integers(1, 36_500))
def test_everybody_gets_what_its_part_needs(
    tmp_path_factory: pytest.TempPathFactory, hosts: list[str], workers: int, days: int
) -> None:
    """Hosts for a shard and a role for all others; signed by the authority, for the days that were asked for."""
    paths = write_certificates(tmp_path_factory.mktemp("certificates"), hosts, workers, days)
    ranks = [f"worker-{rank}" for rank in range(workers)]
    assert list(paths) == ["ca", "shard", *ranks, "observer", "operator"]
    authority = certificate(paths["ca"][0])
    for name, (pem, key) in paths.items():
        TlsFiles(paths["ca"][0], pem, key)  # the key is its key
        made = certificate(pem)
        made.verify_directly_issued_by(authority)
        now = dt.datetime.now(dt.UTC)
        assert made.not_valid_before_utc < now
        assert abs(made.not_valid_after_utc - now - dt.timedelta(days=days)) < dt.timedelta(minutes=2)
        assert made.extensions.get_extension_for_class(x509.BasicConstraints).value.ca == (name == "ca")
        if name != "ca":
            (unit,) = made.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
            assert unit.value == name.partition("-")[0]
            purpose = ExtendedKeyUsageOID.SERVER_AUTH if name == "shard" else ExtendedKeyUsageOID.CLIENT_AUTH
            assert list(made.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [purpose]
    named = certificate(paths["shard"][0]).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    texts = {*named.get_values_for_type(x509.DNSName), *map(str, named.get_values_for_type(x509.IPAddress))}
    assert texts == {str(ipaddress.ip_address(host)) if ":" in host else host for host in (*hosts, *LOOPBACK_HOSTS)}


def test_keys_are_their_owners_alone(tmp_path: Path) -> None:
    """Keys 0600, certificates 0644, a new folder 0700: whatever the process's mask allows."""
    paths = write_certificates(tmp_path / "new" / "folder")
    assert stat.S_IMODE((tmp_path / "new" / "folder").stat().st_mode) == 0o700
    for pem, key in paths.values():
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        assert stat.S_IMODE(pem.stat().st_mode) & 0o133 == 0


@pytest.mark.parametrize("name", ["ca.key", "shard.pem", "worker-1.key", "operator.pem"])
@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_nothing_is_overwritten(tmp_path: Path, name: str, kind: str) -> None:
    """One file of its name, and nothing at all is written; the message names it."""
    taken = tmp_path / name
    if kind == "file":
        taken.write_text("precious", encoding="ascii")
    else:
        taken.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigurationError, match=f"{name} exists already"):
        write_certificates(tmp_path, workers=2)
    assert list(tmp_path.iterdir()) == [taken]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "0"], "make no sense"),
        (["--days", "0"], "make no sense"),
        (["--days", "40000"], "make no sense"),
        (["--hosts", "shard-0:5000"], "is no host"),
        (["--hosts", "[::1]"], "is no host"),
        (["--hosts", "a b"], "is no host"),
        (["--hosts", "grün.example"], "is no host"),
    ],
)
def test_what_makes_no_sense_is_bad_usage(tmp_path: Path, options: list[str], message: str) -> None:
    """Exit code 2, a message, and no file."""
    told = runner.invoke(app, ["certs", str(tmp_path / "new"), *options])
    assert told.exit_code == 2
    assert message in " ".join(told.output.split())
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """A file is in its place."""
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="file/folder cannot be made: Not a directory"):
        write_certificates(tmp_path / "file" / "folder")


def test_the_command_tells_where_everything_is(tmp_path: Path) -> None:
    """As lines for people, as JSON for programs; never what is in a key."""
    people = runner.invoke(app, ["certs", str(tmp_path / "one")])
    told = runner.invoke(app, ["certs", str(tmp_path / "two"), "--workers", "2", "--hosts", "h0,10.0.0.7", "--json"])
    assert people.exit_code == told.exit_code == 0
    assert [line.split()[0] for line in people.stdout.splitlines()] == [
        "ca", "shard", "worker-0", "observer", "operator",
    ]  # fmt: skip
    assert json.loads(told.stdout)["worker-1"] == {
        "certificate": str(tmp_path / "two" / "worker-1.pem"),
        "key": str(tmp_path / "two" / "worker-1.key"),
    }
    assert "PRIVATE" not in people.output + told.output


def test_without_the_library_the_command_says_what_to_install(tmp_path: Path) -> None:
    """It is an extra, and everything else works without it."""
    code = (
        "import sys; sys.modules['cryptography'] = None; from thresher.deploy.cli import main; "
        f"sys.argv = ['thresher', 'certs', {str(tmp_path / 'new')!r}]; main()"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 2
    assert "pip install 'thresher[certs]'" in told.stderr
