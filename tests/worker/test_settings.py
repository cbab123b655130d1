"""Settings travel through the environment without loss, and what cannot be read is named."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.worker.phonebook import install

from thresher.protos.errors import ConfigurationError, ConnectionTimeoutError, ProtocolError
from thresher.worker import Method, Settings
from thresher.worker.settings import settings_from

methods = st.one_of(
    st.sampled_from([Method("Identity"), Method("Layers(TopK(0.1), {'*.bias': Identity})", nonfinite="skip")]),
    st.builds(Method, threshold=st.floats(0, 1e9), nonfinite=st.sampled_from(["refuse", "skip"])),
    st.builds(Method, density=st.floats(1e-9, 1), rule=st.sampled_from(["budget", "calibrated", "paper"])),
    st.builds(Method, budget=st.integers(1, 10**15), steps=st.integers(1, 10**9)),
    st.builds(
        Method,
        precision=st.floats(1e-9, 1),
        placement=st.just("update"),
        period=st.integers(1, 1000),
        outer=st.sampled_from(["", "SGD(lr=0.7, momentum=0.9)"]),
    ),
)
addresses = st.one_of(
    st.builds("{}:{}".format, st.sampled_from(["127.0.0.1", "[::1]", "shard-0.example"]), st.integers(0, 65535)),
    st.builds("ray://{}/{}".format, st.sampled_from(["digits", "a.b-c_1"]), st.integers(0, 99)),
)


@st.composite
def every_settings(draw: st.DrawFn) -> Settings:
    workers = draw(st.integers(1, 1000))
    return Settings(
        addresses=tuple(draw(st.lists(addresses, min_size=1, max_size=4))),
        rank=draw(st.integers(0, workers - 1)),
        workers=workers,
        seed=draw(st.integers(-(2**70), 2**70)),
        method=draw(methods),
        state_dir=draw(st.none() | st.just(Path("a/b"))),
        state_sync=draw(st.booleans()),
        state_is_local=draw(st.booleans()),
        connect_timeout=draw(st.floats(0, 1e9)),
        threshold_factor=draw(st.floats(1e-9, 1e9)),
        metrics_listen=draw(st.none() | addresses),
        rows=draw(st.none() | st.just(Path("a/rows.jsonl"))),
        insecure=draw(st.booleans()),
    )


@given(every_settings())
def test_round_trip_through_the_environment(settings: Settings) -> None:
    """What a launcher tells a worker is what the worker reads: settings_from(s.environment()) == s."""
    assert settings_from(settings.environment()) == settings


COMPLETE = Settings(("127.0.0.1:1",), rank=0, workers=2).environment()


@pytest.mark.parametrize("name", ["RANK", "WORKERS"])
def test_missing_variables_are_named(name: str) -> None:
    """A worker that is half configured says which variable it lacks."""
    environment = {key: value for key, value in COMPLETE.items() if key != f"THRESHER_{name}"}
    with pytest.raises(ConfigurationError, match=f"THRESHER_{name} is not set"):
        settings_from(environment)


def test_without_shards_the_way_to_start_is_told() -> None:
    """A script that was started by hand says how to start it."""
    with pytest.raises(ConfigurationError, match=r"thresher launch script\.py.*THRESHER_SHARDS"):
        settings_from({"PATH": "/bin"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RANK", "one"),
        ("RANK", "0.5"),
        ("WORKERS", "nan"),
        ("SEED", "1e400"),
        ("THRESHOLD", "small"),
        ("DENSITY", ""),
        ("CONNECT_TIMEOUT", "soon"),
        ("INSECURE", "yes"),
        ("STATE_IS_LOCAL", "no"),
        ("THRESHOLD_FACTOR", "two"),
        ("PERIOD", "often"),
        ("BUDGET", "500MB"),
    ],
)
def test_ill_formed_variables_are_named(name: str, value: str) -> None:
    """Nothing is guessed: a switch is 0 or 1, a count is whole; the message has name and value."""
    with pytest.raises(ConfigurationError, match=f"THRESHER_{name} must be .*{value}"):
        settings_from({**COMPLETE, f"THRESHER_{name}": value})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"THRESHER_SHARDS": ","}, "no shard is named"),
        ({"THRESHER_RANK": "2"}, r"rank 2 is not one of 0 … 1"),
        ({"THRESHER_RANK": "-1"}, r"rank -1 is not one of 0 … 1"),
        ({"THRESHER_CONNECT_TIMEOUT": "nan"}, "connect timeout must be finite"),
        ({"THRESHER_CONNECT_TIMEOUT": "-1"}, "connect timeout must be finite"),
        ({"THRESHER_COMPRESSOR": "topk"}, "no method 'topk'"),
        ({"THRESHER_THRESHOLD_FACTOR": "0"}, "threshold factor must be a finite number > 0"),
        ({"THRESHER_THRESHOLD_FACTOR": "nan"}, "threshold factor must be a finite number > 0"),
        ({"THRESHER_THRESHOLD": "nan"}, "not nan"),
    ],
)
def test_values_out_of_range(change: dict[str, str], text: str) -> None:
    """They are refused before anything is sent."""
    with pytest.raises(ConfigurationError, match=text):
        settings_from({**COMPLETE, **change})


def test_without_a_method_everything_is_sent() -> None:
    """The default is the hard threshold 0."""
    bare = {"THRESHER_SHARDS": "127.0.0.1:1", "THRESHER_RANK": "0", "THRESHER_WORKERS": "1"}
    assert settings_from(bare) == Settings(("127.0.0.1:1",), rank=0, workers=1, method=Method(threshold=0.0))


OF_THE_RUN = {
    **COMPLETE,
    "THRESHER_SHARDS": "phone://digits/0,phone://digits/1",
    "THRESHER_WORKERS": "4",
    "THRESHER_SEED": "7",
    "PATH": "/elsewhere",
}


def test_a_run_is_told_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything comes from its directory, whether the name is handed over or in the environment."""
    book = install(tmp_path, monkeypatch)
    book.run_variables["digits"] = OF_THE_RUN
    expected = settings_from(OF_THE_RUN)
    assert expected.addresses == ("phone://digits/0", "phone://digits/1")
    assert settings_from({}, addresses="phone://digits") == expected
    assert settings_from({"THRESHER_SHARDS": "phone://digits"}) == expected
    assert settings_from({"THRESHER_SHARDS": "127.0.0.1:1"}, addresses="phone://digits") == expected
    assert book.looks == [], "shards are looked up when they are called"


def test_what_is_set_here_goes_before_what_the_run_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the shards; and what only one of them says is taken from there."""
    book = install(tmp_path, monkeypatch)
    book.run_variables["digits"] = {name: value for name, value in OF_THE_RUN.items() if name != "THRESHER_RANK"}
    with pytest.raises(ConfigurationError, match="THRESHER_RANK is not set"):
        settings_from({}, addresses="phone://digits")
    own = {"THRESHER_RANK": "3", "THRESHER_SEED": "8", "THRESHER_STATE_DIR": "mine"}
    found = settings_from({**own, "THRESHER_SHARDS": "10.0.0.1:1"}, addresses="phone://digits")
    assert (found.rank, found.workers, found.seed, found.state_dir) == (3, 4, 8, Path("mine"))
    assert found.addresses == ("phone://digits/0", "phone://digits/1")
    with pytest.raises(ConfigurationError, match=r"rank 3 is not one of 0 … 1"):
        settings_from({**own, "THRESHER_WORKERS": "2"}, addresses="phone://digits")


def test_shards_that_are_named_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of these no directory is asked for variables: the rest is told as ever."""
    install(tmp_path, monkeypatch).trouble = ProtocolError("it was asked")
    found = settings_from({**COMPLETE, "THRESHER_SHARDS": "phone://digits/0"})
    assert found.addresses == ("phone://digits/0",)
    found = settings_from({**COMPLETE, "THRESHER_SHARDS": "phone://digits/0,127.0.0.1:1"})
    assert found.addresses == ("phone://digits/0", "127.0.0.1:1")


def test_a_run_that_cannot_be_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the directory says goes on as it is; a name that is none is refused, and so is one nobody knows."""
    install(tmp_path, monkeypatch).trouble = ConnectionTimeoutError("the cluster does not answer")
    with pytest.raises(ConnectionTimeoutError, match="the cluster does not answer"):
        settings_from(COMPLETE, addresses="phone://digits")
    with pytest.raises(ConfigurationError, match="no name of a run"):
        settings_from(COMPLETE, addresses="phone://die Ziffern")
    with pytest.raises(ConfigurationError, match="knows addresses of fax://"):
        settings_from(COMPLETE, addresses="fax://digits")
