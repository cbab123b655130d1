"""Names of runs and shards: every one is read as it is written, and what cannot be found is said with its remedy."""

import string
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests.worker.phonebook import THIS, install

from thresher.protos.errors import (
    ConfigurationError,
    ConnectionTimeoutError,
    DataLossError,
    ProtocolError,
    ThresherError,
)
from thresher.worker.directory import Name, check_run, check_shard, locate, name_in, variables_of

runs = st.text(string.ascii_letters + string.digits + "-_.", min_size=1, max_size=100)
names = st.builds(
    Name,
    st.from_regex(r"[a-z][a-z0-9+.-]*", fullmatch=True),
    runs,
    st.none() | st.integers(0, 999_999_999),
)


@given(names)
def test_a_name_is_read_as_it_is_written(name: Name) -> None:
    assert name_in(str(name)) == name


@given(st.text() | st.builds("{}://{}".format, st.text(), st.text()))
@example("ray://digits\n")
@example("ray://digits/²")
def test_any_other_text_is_an_address_or_refused(text: str) -> None:
    """What is read as a name is written as that name, and nothing but our own error is raised."""
    try:
        name = name_in(text)
    except ConfigurationError:
        name, refused = None, True
    else:
        refused = False
    assert (name is None) == (refused or "://" not in text)
    assert "://" in text or not refused
    if name is not None:
        assert name_in(str(name)) == name
        check_run(name.run)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ray://", "'' is no name of a run; take letters"),
        ("ray:///0", "'' is no name of a run"),
        ("ray://über", "'über' is no name of a run"),
        ("ray://a b/0", "'a b' is no name of a run"),
        ("ray://" + "a" * 101, "at most 100 of them"),
        ("://digits", "neither host:port nor a name; write SCHEME://RUN"),
        ("Ray://digits", "neither host:port nor a name"),
        ("ray://digits/", "neither host:port nor a name"),
        ("ray://digits/first", "neither host:port nor a name"),
        ("ray://digits/-1", "neither host:port nor a name"),
        ("ray://digits/0/1", "neither host:port nor a name"),
        ("ray://digits/0,ray://digits/1", "neither host:port nor a name"),
    ],
)
def test_what_is_no_name_is_refused(address: str, message: str) -> None:
    for read in (name_in, locate):
        with pytest.raises(ConfigurationError, match=message):
            read(address)


def test_a_worker_takes_addresses_and_names_of_shards() -> None:
    """Plain text beyond this machine is refused here already where the address tells; a run alone is no shard."""
    for address in ("127.0.0.1:1", "ray://digits/0"):
        check_shard(address, insecure=False, encrypted=False)
    check_shard("192.0.2.1:5", insecure=True, encrypted=False)
    check_shard("192.0.2.1:5", insecure=False, encrypted=True)
    with pytest.raises(ConfigurationError, match=r"192\.0\.2\.1:5 is reached over a network"):
        check_shard("192.0.2.1:5", insecure=False, encrypted=False)
    with pytest.raises(ConfigurationError, match="ray://digits names a run, and no shard of it; give it alone"):
        check_shard("ray://digits", insecure=True, encrypted=True)


def test_a_directory_is_asked_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found by its scheme, made once, and asked each time; an address is its own answer."""
    book = install(tmp_path, monkeypatch)
    book.places["digits"] = ["127.0.0.1:1", "127.0.0.1:2"]
    assert [locate("phone://digits/0"), locate("phone://digits/1")] == ["127.0.0.1:1", "127.0.0.1:2"]
    monkeypatch.setitem(book.places, "digits", ["127.0.0.1:3"])
    assert locate("phone://digits/0") == "127.0.0.1:3"
    assert [locate("127.0.0.1:9"), len(book.looks)] == ["127.0.0.1:9", 3]
    with pytest.raises(ConfigurationError, match="phone://digits names a run, and no shard of it"):
        locate("phone://digits")


def test_a_run_has_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the shards among them they are of no use, and whose fault that is gets said."""
    book = install(tmp_path, monkeypatch)
    whole = {"THRESHER_SHARDS": "phone://digits/0", "THRESHER_SEED": "7"}
    found: Mapping[str, Mapping[str, str]] = {"digits": whole, "empty": {"THRESHER_SHARDS": ""}, "other": {}}
    book.run_variables.update(found)
    assert variables_of(Name("phone", "digits")) == whole
    for run in ("empty", "other"):
        with pytest.raises(ProtocolError, match=f"the directory of phone://{run} does not name its shards"):
            variables_of(Name("phone", run))


def test_a_scheme_that_nobody_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that there are get listed, so that a misspelt one is seen."""
    install(tmp_path, monkeypatch)
    with pytest.raises(ConfigurationError, match=r"knows addresses of rey://; known: .*phone://.*\. Correct"):
        locate("rey://digits/0")


@pytest.mark.parametrize(
    ("scheme", "remedy"), [("ray", r"pip install 'thresher\[ray\]'"), ("phone", "install no_such_module")]
)
def test_a_directory_whose_package_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, remedy: str
) -> None:
    """What is missing is named, and how it is installed."""
    install(tmp_path, monkeypatch, **{scheme: "no_such_module:Directory"})
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=f"{scheme}:// cannot be used here: .*no_such_module.*; {remedy}"):
            locate(f"{scheme}://digits/0")


@pytest.mark.parametrize(
    "error", [ConnectionTimeoutError("it restarts"), DataLossError("it is damaged"), ConfigurationError("no such run")]
)
def test_what_a_directory_says_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: ThresherError) -> None:
    """Its own words, and its own kind: which tells whether another attempt may help."""
    install(tmp_path, monkeypatch).trouble = error
    with pytest.raises(type(error)) as caught:
        locate("phone://digits/0")
    assert caught.value is error
    with pytest.raises(type(error)) as caught:
        variables_of(Name("phone", "digits"))
    assert caught.value is error


def test_a_directory_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing foreign leaks out of one: neither when it is asked, nor when it is made."""
    install(tmp_path, monkeypatch, odd=f"{THIS}:THIS", none=f"{THIS}:missing")
    with pytest.raises(ProtocolError, match="the directory of phone://digits/0 has failed: KeyError: 'digits'"):
        locate("phone://digits/0")
    with pytest.raises(ProtocolError, match="the directory of odd://digits/0 has failed: TypeError: 'str' object"):
        locate("odd://digits/0")
    with pytest.raises(ProtocolError, match="the directory of none://digits has failed: AttributeError"):
        variables_of(Name("none", "digits"))
