"""The rehearsal: bytes are those of the codec, elements those asked for, and what is larger is scaled."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.deploy.advise import rehearsal
from thresher.deploy.advise.model import Model, model_of
from thresher.deploy.advise.rehearsal import Costs, Rehearsal, first_tensors, rehearse
from thresher.deploy.advise.settings import EVERYTHING, Setting, settings_for, update_density
from thresher.protos.optimizers import spec_of

NUMEL = 30_000
MODEL = Model("small", (20_000, 10_000))


def costs_of(setting: Setting = EVERYTHING, shards: int = 1, workers: int = 2, model: Model = MODEL) -> Costs:
    union = update_density(setting.density, workers)
    return Rehearsal(model, shards, workers).costs(setting, union)


@pytest.mark.parametrize("setting", settings_for([0.05]), ids=lambda setting: setting.name)
@pytest.mark.parametrize("workers", [1, 3])
def test_every_setting_is_rehearsed(setting: Setting, workers: int) -> None:
    """Every part took time in each repetition, and bytes are about those of the densities."""
    found = costs_of(setting, workers=workers)
    for part in (found.compress, found.shard, found.replay):
        assert part.size > 1
        assert (part > 0).all()
    value_bytes = 2 if "bfloat16" in setting.name else 4
    least = NUMEL * setting.density * value_bytes
    assert least < found.push_bytes[0] < 1.6 * least + 300
    down = NUMEL * found.update_density * (value_bytes if workers == 1 else 4)
    assert 0.9 * down < found.pull_bytes[0] < 1.6 * down + 300


def test_shards_share_the_bytes() -> None:
    one, three = (costs_of(shards=shards) for shards in (1, 3))
    assert len(three.push_bytes) == len(three.pull_bytes) == 3
    assert sum(three.push_bytes) == pytest.approx(sum(one.push_bytes), rel=0.01)


def test_of_a_large_model_a_part_is_rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """And bytes are those of the whole."""
    whole = costs_of()
    monkeypatch.setattr(rehearsal, "MOST_ELEMENTS", NUMEL // 10)
    part = costs_of()
    assert sum(part.push_bytes) == pytest.approx(sum(whole.push_bytes), rel=0.01)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=20), st.integers(1, 5000))
def test_the_first_tensors_are_whole_but_for_the_last(sizes: list[int], most: int) -> None:
    """So a tensor costs as much as it does in the model, and there are as many of them for each element."""
    found = first_tensors(sizes, most)
    assert sum(found) == min(sum(sizes), most)
    assert found[:-1] == sizes[: len(found) - 1]
    assert 0 < found[-1] <= sizes[len(found) - 1]


@pytest.mark.slow
def test_workers_of_one_machine_rehearse_at_once() -> None:
    """Each has its own seconds, and they send the same."""
    alone, two = (rehearse(MODEL, 1, 2, here, [(EVERYTHING, 1.0)]) for here in (1, 2))
    assert [one.setting for one in two] == [EVERYTHING]
    assert two[0].push_bytes == alone[0].push_bytes
    for part in ("compress", "shard", "replay"):
        assert getattr(two[0], part).size == 2 * getattr(alone[0], part).size


def test_the_optimizer_is_the_models_own() -> None:
    """Adam has two moments to move; it is applied without complaint."""
    spec = spec_of(torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))]))
    assert costs_of(model=Model("adam", (NUMEL,), spec)).push_bytes[0] > 4 * NUMEL


def test_a_model_of_one_parameter_is_one() -> None:
    assert costs_of(model=model_of(1)).push_bytes[0] > 4
