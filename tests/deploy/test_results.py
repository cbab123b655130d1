"""What a run leaves behind."""

import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from thresher.deploy.in_process import InProcess, in_process
from thresher.deploy.results import (
    _longest_waits,
    bytes_text,
    merge_iterations,
    read_results,
    save_model,
    save_optimizer,
    summarize,
    write_results,
)
from thresher.protos import faults
from thresher.protos.consistency import Consistency
from thresher.protos.errors import ConfigurationError, ProtocolError
from thresher.v1 import aggregation_pb2 as pb
from thresher.worker import Method, Session
from thresher.worker.calls import ShardCalls
from thresher.worker.snapshot import Snapshot


def statistics_of(shards: int, workers: int, numel: int, steps: int, density: float) -> list[pb.StatisticsResponse]:
    """Shards of equal size whose workers pushed alike."""
    one = pb.WorkerStatistics(
        steps=steps,
        push_bytes=1000,
        pull_bytes=3000,
        pushed_elements=int(density * steps * numel),
        pushable_elements=steps * numel,
    )
    return [pb.StatisticsResponse(version=steps, numel=numel, workers=[one] * workers) for _ in range(shards)]


def test_a_summary_adds_up_shards_and_workers() -> None:
    """Bytes add up, density is elements over possible elements, the ratio is dense bytes over bytes moved."""
    one = summarize(statistics_of(2, 4, numel=100, steps=50, density=0.1), {"accuracy": 0.5, "loss": 1.0}, seconds=3.0)
    assert (one.accuracy, one.loss, one.steps, one.seconds) == (0.5, 1.0, 50, 3.0)
    assert (one.push_bytes, one.pull_bytes) == (8000, 24000)
    assert one.dense_bytes == 2 * 4 * (2 * 4 * 50 * 100)
    assert one.mean_density == pytest.approx(0.1)
    assert one.compression_ratio == pytest.approx(one.dense_bytes / 32000)


def test_a_summary_says_where_each_shard_ended() -> None:
    """Outside of lockstep shards decide for themselves: the steps are those of the one that closed most rounds."""
    (first,), (other,) = (statistics_of(1, 2, 10, steps, 1.0) for steps in (161, 162))
    one = summarize([first, other], {}, 1.0)
    assert (one.steps, one.versions) == (162, [161, 162])


def test_a_summary_takes_numbers_only() -> None:
    """What a script prints under a name of ours is taken when it is a number."""
    one = summarize(statistics_of(1, 1, 10, 1, 1.0), {"accuracy": "good", "loss": True}, 1.0)
    assert (one.accuracy, one.loss) == (None, None)


def test_a_summary_without_what_a_script_did_not_print() -> None:
    """A script that prints no accuracy has none."""
    assert summarize(statistics_of(1, 1, 10, 1, 1.0), {}, 1.0).accuracy is None


@given(st.floats(0, 1e15))
def test_byte_texts_are_within_half_a_per_cent(count: float) -> None:
    """Three digits: read back, the text is the count again, roughly."""
    number, unit = bytes_text(count).split()
    back = float(number) * 10 ** {"B": 0, "kB": 3, "MB": 6, "GB": 9, "TB": 12}[unit]
    assert back == pytest.approx(count, rel=0.006, abs=0.6)


def rows_of_two_shards(folder: Path) -> list[Path]:
    """The files of two shards with a round each."""
    common = {"version": 1, "members": 2, "contributors": [0, 1], "skipped": False, "only_mean": False}
    common |= {"threshold": 0.1, "learning_rate": 0.5, "push_bytes": 10, "pull_bytes": 20, "residual_squared": 2.0}
    counts = {0: (5.0, 30, 6, 0.1, 5, 0.1), 1: (6.0, 10, 4, 0.2, 1, 0.3)}
    names = ("time", "numel", "pushed_elements", "push_density", "update_elements", "round_seconds")
    waits = {0: [0.0, 0.04], 1: [0.02, 0.0]}
    rows = [
        {**common, "shard": shard, **dict(zip(names, values, strict=True)), "barrier_seconds": waits[shard]}
        for shard, values in counts.items()
    ]
    for row in rows:
        (folder / f"{row['shard']}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    return [folder / "0.jsonl", folder / "1.jsonl"]


def test_iterations_of_shards_become_iterations_of_the_model(tmp_path: Path) -> None:
    """A merged row has the sums of its parts, densities of the whole, and the slowest shard's time."""
    merge_iterations(rows_of_two_shards(tmp_path), tmp_path / "all.jsonl", lockstep=True)
    merged = json.loads((tmp_path / "all.jsonl").read_text(encoding="utf-8"))
    assert (merged["push_bytes"], merged["pull_bytes"], merged["numel"]) == (20, 40, 40)
    assert (merged["push_density"], merged["update_density"]) == (10 / 80, 6 / 40)
    assert (merged["residual_norm"], merged["round_seconds"], merged["time"]) == (2.0, 0.3, 6.0)
    assert merged["barrier_seconds"] == [0.02, 0.04]
    assert "shard" not in merged


@given(st.lists(st.tuples(st.permutations(range(4)), st.integers(1, 4)), min_size=1, max_size=3), st.data())
def test_a_push_has_waited_as_long_as_where_it_waited_longest(
    parts: list[tuple[list[int], int]], data: st.DataObject
) -> None:
    """By rank, for the contributors of the first shard: others may have been missed there, or have missed here."""
    rows: list[dict[str, Any]] = []
    for ranks, count in parts:
        seconds = data.draw(st.lists(st.floats(0, 100), min_size=count, max_size=count))
        rows.append({"contributors": sorted(ranks[:count]), "barrier_seconds": seconds})
    merged = _longest_waits(rows[0]["contributors"], rows)
    waits = [dict(zip(row["contributors"], row["barrier_seconds"], strict=True)) for row in rows]
    assert merged == [max(wait.get(rank, 0.0) for wait in waits) for rank in rows[0]["contributors"]]
    assert _longest_waits(rows[0]["contributors"], [*rows, {"barrier_seconds": None}]) is None


def test_outside_of_lockstep_each_shard_has_its_own_iterations(tmp_path: Path) -> None:
    """Rounds of one version at two shards may be of different pushes there: each has a row, which names its shard."""
    merge_iterations(rows_of_two_shards(tmp_path), tmp_path / "all.jsonl", lockstep=False)
    rows = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["version"], row["shard"], row["numel"]) for row in rows] == [(1, 0, 30), (1, 1, 10)]
    assert [row["push_density"] for row in rows] == pytest.approx([0.1, 0.2])


class Tied(nn.Module):
    """Tied weights, trained and frozen ones, batch normalisation, half precision."""

    def __init__(self) -> None:
        """Build it."""
        super().__init__()
        self.embed = nn.Linear(4, 6, bias=False)
        self.norm = nn.BatchNorm1d(6)
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.embed.weight
        self.low = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        self.frozen = nn.Parameter(torch.full((2,), 7.0), requires_grad=False)
        self.frozen_too = self.frozen

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Use everything."""
        hidden: torch.Tensor = self.norm(self.embed(x))
        total: torch.Tensor = hidden.sum() + self.out(x).square().sum() + self.low.float().sum() + self.frozen.sum()
        return total


def snapshots_of(cluster: InProcess) -> list[Snapshot]:
    """Ask each shard, as the launcher does."""
    clients = [ShardCalls(index, address, "the test") for index, address in enumerate(cluster.addresses)]
    found = [client.snapshot(wait_seconds=5.0) for client in clients]
    for client in clients:
        client.close()
    return found


def snapshots_apart() -> list[Snapshot]:
    """Let shard 1 return a push for its age that shard 0 took: it came there two rounds later."""
    on_its_way, too_old = threading.Event(), threading.Event()

    def strike(who: str, phase: str) -> None:
        if (who, phase) == ("worker 1", "in flight") and not on_its_way.is_set():  # to shard 0, and not to shard 1
            on_its_way.set()
            assert too_old.wait(30)

    def work(session: Session) -> None:
        model = nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        session.wrap(model, optimizer)
        if session.rank == 0:
            assert on_its_way.wait(30)
            while cluster.statistics()[0].version == 0:
                time.sleep(0.01)
        for _ in range(2 - session.rank):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        too_old.set()

    consistency = Consistency("async", max_staleness=1)
    with in_process(shards=2, workers=2, consistency=consistency) as cluster, faults.plan(strike):
        cluster.run(work)
        return snapshots_of(cluster)


def snapshots_after(steps: int, shards: int) -> tuple[list[Snapshot], dict[str, torch.Tensor], dict[str, object]]:
    """Train `Tied` on one worker; return the shards' snapshots, the worker's state_dict and its optimizer's."""
    torch.manual_seed(0)
    model = Tied()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)

    def work(session: Session) -> None:
        session.wrap(model, optimizer)
        generator = torch.Generator().manual_seed(0)
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(8, 4, generator=generator)).backward()
            optimizer.step()

    with in_process(shards=shards, workers=1, method=Method(threshold=0.0)) as cluster:
        cluster.run(work)
        found = snapshots_of(cluster)
    return found, dict(model.state_dict()), optimizer.state_dict()


@pytest.mark.parametrize("shards", [1, 3])
def test_a_saved_model_is_the_model(tmp_path: Path, shards: int) -> None:
    """Every name of state_dict(), tied ones and buffers too, with the type and the bits that rank 0 has at the end."""
    found, state, _ = snapshots_after(5, shards)
    save_model(tmp_path / "model.safetensors", found, lockstep=True)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == state.keys()
    for name, value in state.items():
        assert saved[name].dtype == value.dtype
        assert torch.equal(saved[name], value), name
    Tied().load_state_dict(saved)


def test_a_saved_optimizer_is_the_optimizer(tmp_path: Path) -> None:
    """Momenta and step counts by parameter name, as the user's optimizer shows them."""
    found, _, state = snapshots_after(5, 2)
    save_optimizer(tmp_path / "optimizer.safetensors", found)
    saved = load_file(tmp_path / "optimizer.safetensors")
    shown = state["state"]
    assert isinstance(shown, dict)
    names = ["low", "embed.weight", "norm.weight", "norm.bias"]
    assert {name.split("/")[0] for name in saved} == set(names)
    for key in ("exp_avg", "exp_avg_sq", "step"):
        assert torch.equal(saved[f"low/{key}"], shown[0][key].float())


def test_a_model_at_two_versions_is_refused(tmp_path: Path) -> None:
    """In lockstep, shards that are not at one version make no model."""
    found, _, _ = snapshots_after(1, 1)
    later = pb.History(version=found[0].version + 1)
    with pytest.raises(ProtocolError, match="versions"):
        save_model(tmp_path / "model.safetensors", [found[0], replace(found[0], history=later)], lockstep=True)


def test_outside_of_lockstep_a_model_is_a_vector_of_versions(tmp_path: Path) -> None:
    """Each shard closes rounds for itself: the model is that of its own version from each, and says which these are."""
    found = snapshots_apart()
    assert [one.version for one in found] == [3, 2]
    save_model(tmp_path / "model.safetensors", found, lockstep=False)
    save_optimizer(tmp_path / "optimizer.safetensors", found)
    saved = load_file(tmp_path / "model.safetensors")
    parameters = torch.cat([saved[spec.name].view(-1) for spec in found[0].layout.trained])
    assert torch.equal(parameters, torch.cat([one.visible for one in found]))
    for name in ("model", "optimizer"):
        with safe_open(tmp_path / f"{name}.safetensors", "pt") as file:
            assert file.metadata() == {"versions": "[3, 2]"}


def test_the_model_of_a_run_with_a_shadow_is_the_shadow(tmp_path: Path) -> None:
    """What workers copy is the model, not the parameters that it follows."""
    (one,), _, _ = snapshots_after(1, 1)
    save_model(tmp_path / "model.safetensors", [replace(one, shadow=torch.full_like(one.visible, 7.0))], lockstep=False)
    assert load_file(tmp_path / "model.safetensors")["embed.weight"].eq(7.0).all()


def test_results_are_read_back(tmp_path: Path) -> None:
    """What was written is read, run by run, whatever else the file says; no file holds none."""
    path = tmp_path / "result.json"
    assert read_results(path) == {}
    one = summarize(statistics_of(1, 1, 10, 1, 1.0), {"accuracy": 0.5}, 1.0)
    write_results(path, {"sparse": one}, workers=2)
    assert read_results(path) == {"sparse": one}


def test_a_file_that_cannot_be_read_is_named_with_what_to_do(tmp_path: Path) -> None:
    """A disk or a folder that does not give it is no foreign error, for results and for rows."""
    path = tmp_path / "result.json"
    path.mkdir()
    with pytest.raises(ConfigurationError, match=r"result\.json cannot be read: Is a directory; mend"):
        read_results(path)
    with pytest.raises(ConfigurationError, match=r"shard-0\.jsonl cannot be read: No such file or directory; mend"):
        merge_iterations([tmp_path / "shard-0.jsonl"], tmp_path / "whole.jsonl", lockstep=True)


@pytest.mark.parametrize("text", ["{", '{"sparse": {"accuracy": 1}}', "[]"])
def test_a_file_that_holds_no_results_is_refused(tmp_path: Path, text: str) -> None:
    """It is named, and nothing is made of it."""
    path = tmp_path / "result.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"result\.json holds no results"):
        read_results(path)
