"""What a run is told: checked before anything is started, and the same when it is read back from the run's folder."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.deploy.launch_config import LaunchConfig
from thresher.protos.consistency import Consistency
from thresher.protos.errors import ConfigurationError
from thresher.protos.timeouts import JOURNAL_SECONDS
from thresher.worker import Method
from thresher.worker.settings import settings_from

PLAIN = LaunchConfig((__file__,), 1, 2, Method(threshold=0.0))

configs = st.builds(
    LaunchConfig,
    command=st.lists(st.text(), max_size=3).map(lambda arguments: (__file__, *arguments)),
    shards=st.integers(1, 9),
    workers=st.just(3),
    method=st.sampled_from(
        [Method(density=0.1), Method("TopK(0.1)"), Method(threshold=0.5, placement="update", period=4)]
    ),
    consistency=st.sampled_from(
        [
            Consistency(),
            Consistency(quorum=2, grace=0.1),
            Consistency("ssp", staleness=3, staleness_aware=True),
            Consistency("async", downlink="shadow", shadow_threshold=0.5),
        ]
    ),
    seed=st.integers(0, 2**40),
    lease=st.floats(1e3, 1e6),
    round_timeout=st.floats(1e6, 1e9),
    threshold_factors=st.sampled_from([(), (1.0, 2.0, 0.1)]),
    durability=st.sampled_from(["none", "process", "disk"]),
    restarts=st.integers(0, 1000),
    restart_delay=st.floats(0, 1e3),
    baseline=st.booleans(),
)


@given(configs)
def test_what_was_written_is_read(tmp_path_factory: pytest.TempPathFactory, config: LaunchConfig) -> None:
    """Law: `read` inverts `write`."""
    path = tmp_path_factory.mktemp("run") / "launch.json"
    config.write(path)
    assert LaunchConfig.read(path) == config


@given(configs)
def test_workers_read_what_they_are_told(config: LaunchConfig) -> None:
    """The environment that a worker gets holds all that concerns it."""
    told = config.settings(("127.0.0.1:1",), 2, Path("state"))
    assert settings_from(told.environment()) == told
    assert (told.method, told.consistency, told.seed) == (config.method, config.consistency, config.seed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shards": 0}, "at least one shard and one worker"),
        ({"workers": 0}, "at least one shard and one worker"),
        ({"command": ("nowhere.py",)}, r"no script 'nowhere\.py'"),
        ({"command": ()}, "no script ''"),
        ({"threshold_factors": (1.0,)}, "1 threshold factors for 2 workers"),
        ({"durability": "much"}, "durability is one of none, process, disk"),
        ({"restarts": -1}, "must not be negative"),
        ({"restart_delay": float("nan")}, "restart delay must be finite"),
        ({"linger": -1.0}, "linger must be finite and not negative"),
        ({"lease": 3600.0}, "lease of 3600 s is longer than round timeout of 1800 s"),
        ({"lease": 0.5}, "restart delay of 1 s is longer than lease of 0.5 s"),
        (
            {"consistency": Consistency(quorum=1, grace=3600.0)},
            "grace of 3600 s is longer than round timeout of 1800 s",
        ),
        ({"consistency": Consistency(quorum=3)}, "a quorum of 3 is more than 2 workers"),
        (
            {
                "consistency": Consistency("async", momentum_per_push=True),
                "method": Method(threshold=0.5, placement="update"),
            },
            "momentum_per_push is about the shards' optimizer",
        ),
        (
            {"consistency": Consistency("async"), "method": Method(budget=10, steps=2)},
            "a budget in bytes counts rounds",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(change: dict[str, Any], message: str) -> None:
    """Each before anything is started, with what is wrong."""
    with pytest.raises(ConfigurationError, match=message):
        replace(PLAIN, **change)


@given(configs)
def test_who_is_started_again_is_in_time(config: LaunchConfig) -> None:
    """A worker with half of its lease to start in, unless the delay takes more; a shard before its workers give up."""
    patience = config.settings(("127.0.0.1:1",), 0, None).reconnect_timeout
    assert config.restart_delay <= config.lease
    assert config.longest_pause <= max(config.restart_delay, config.lease / 2)
    assert config.longest_pause + JOURNAL_SECONDS <= patience
    assert config.lease <= patience


def test_the_script_lies_where_the_run_was_started(tmp_path: Path) -> None:
    """A relative script is looked for in the directory of the run, wherever it is resumed from."""
    (tmp_path / "script.py").touch()
    assert replace(PLAIN, command=("script.py",), directory=str(tmp_path)).command == ("script.py",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no folder of a run"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ("{}", "cannot be read"),
        ('{"method": {"threshold": 0}, "consistency": {"mode": "chaos"}}', "mode must be one of"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    """Missing, damaged, or of settings that are no longer possible."""
    path = tmp_path / "launch.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigurationError, match=message):
        LaunchConfig.read(path)


def test_a_baseline_is_a_second_stage(tmp_path: Path) -> None:
    """The same with everything sent, in a folder of its own."""
    assert list(PLAIN.stages(tmp_path)) == ["sparse"]
    config = replace(PLAIN, baseline=True, method=Method(density=0.1), threshold_factors=(1.0, 2.0))
    dense, folder = config.stages(tmp_path)["dense"]
    assert (dense.method.threshold, dense.threshold_factors, folder) == (0.0, (), tmp_path / "dense")
