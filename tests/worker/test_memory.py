"""A worker's memory: what was flipped comes back whole, whatever happens in between."""

import os
import random
import resource
import struct
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from thresher.protos.errors import ConfigurationError, DataLossError
from thresher.worker import memory as module
from thresher.worker.memory import Memory, MemoryFileError, State

PAGE = 4096
RUN = "run 7, worker 0, layout 5f3a, HardThreshold"

NAMES = "float32 float64 float16 bfloat16 complex64 float8_e4m3fn int64 int32 int16 int8 uint8"
DTYPES = [getattr(torch, name) for name in NAMES.split()]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any bits of any dtype in any small shape, scalars and empty ones included."""
    if draw(st.booleans()):
        return torch.tensor(draw(st.lists(st.booleans(), max_size=9)), dtype=torch.bool)
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    size = torch.Size(shape).numel() * dtype.itemsize
    data = torch.tensor(list(draw(st.binary(min_size=size, max_size=size))), dtype=torch.uint8)
    return data.view(dtype).reshape(shape)


leaves = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=9) | tensors()
)


def containers(inner: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    lists = st.lists(inner, max_size=3)
    return lists | lists.map(tuple) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3)


states = st.dictionaries(st.text(max_size=5), st.recursive(leaves, containers, max_leaves=8), max_size=4)

each_file = settings(max_examples=40)  # a law that opens several files for each example


def bits(value: object) -> object:
    """``value`` in a form whose equality is that of types and bits: NaN equals itself, and -0.0 is not 0.0."""
    match value:
        case Tensor():
            plain = torch.empty(value.numel(), dtype=value.dtype).copy_(value.detach().flatten())
            return value.dtype, value.shape, plain.view(torch.uint8).tolist()
        case float():
            return "float", struct.pack("<d", value)
        case list() | tuple():
            return type(value), [bits(item) for item in value]
        case dict():
            return dict, [(bits(key), bits(item)) for key, item in value.items()]
    return type(value), value


def opened(path: Path, **options: Any) -> "closing[Memory]":
    return closing(Memory(path, RUN, **options))


def written(path: Path, *history: State) -> bytes:
    """The content of a file after some flips."""
    with opened(path) as memory:
        for state in history:
            memory.flip(state)
    return path.read_bytes()


def loaded(path: Path) -> State | None:
    with opened(path) as memory:
        return memory.load()


def damage(path: Path, *bit_numbers: int) -> None:
    content = bytearray(path.read_bytes())
    for number in bit_numbers:
        content[number // 8] ^= 1 << number % 8
    path.write_bytes(content)


@each_file
@given(st.lists(states, min_size=1, max_size=3), st.integers(5, 99))
def test_the_last_state_comes_back_bit_for_bit(history: list[State], block: int) -> None:
    """NaN payloads, -0.0, empty tensors, integer keys and tuples included, wherever blocks begin and end."""
    with TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", block)
        path = Path(place, "memory")
        written(path, *history)
        assert bits(loaded(path)) == bits(history[-1])


def test_a_state_of_several_blocks_comes_back(tmp_path: Path) -> None:
    """A tensor is longer than a block, and thousands are shorter."""
    state = {"large": torch.randn(3_000_001), "small": list(torch.arange(2000))}
    written(tmp_path / "memory", state)
    assert bits(loaded(tmp_path / "memory")) == bits(state)


def test_a_view_comes_back_as_a_tensor_of_its_own(tmp_path: Path) -> None:
    """Contiguous, without history, and with the values that the view showed; a subclass as its base."""
    matrix, number = torch.arange(6.0).reshape(2, 3), torch.tensor([1 + 2j]).conj()
    plain = (matrix.t(), matrix[:, ::2], matrix[0, :1].expand(3), number, number.imag)
    views = OrderedDict(plain=plain, leaf=torch.ones(2, requires_grad=True), parameter=nn.Parameter(torch.ones(2)))
    written(tmp_path / "memory", views)
    found = loaded(tmp_path / "memory") or {}
    assert bits(found) == bits({"plain": plain, "leaf": torch.ones(2), "parameter": torch.ones(2)})
    for tensor in (*found["plain"], found["leaf"], found["parameter"]):
        assert (type(tensor), tensor.is_contiguous(), tensor.requires_grad) == (Tensor, True, False)


def test_what_torch_calls_a_state_can_be_kept(tmp_path: Path) -> None:
    """Of a model, an optimizer and a scheduler: integer keys, ordered dicts, a Counter."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    parts = model, optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])
    state = {"states": [part.state_dict() for part in parts]}
    written(tmp_path / "memory", state)
    assert bits(loaded(tmp_path / "memory")) == bits(state)


def test_loaded_tensors_are_not_the_file(tmp_path: Path) -> None:
    """Writing to what was loaded, or to what was flipped, changes nothing that is kept."""
    mine = torch.zeros(3)
    with opened(tmp_path / "memory") as memory:
        memory.flip({"x": mine})
        mine += 1
        (memory.load() or {})["x"] += 5
        assert bits(memory.load()) == bits({"x": torch.zeros(3)})


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"scheduler": {"lr_lambdas": [len]}}, r"^scheduler\.lr_lambdas\[0\]: a builtin_function_or_method cannot"),
        ({"a": [{0: ({1},)}]}, r"^a\[0\]\[0\]\[0\]: a set cannot be kept"),
        ({"a": {(1, 2): 3}}, r"^a: a dict whose keys are not all str or int cannot be kept"),
        ({"a": torch.eye(2).to_sparse()}, r"^a: a Tensor cannot be kept.*dense"),
        ([1, object()], r"^\[1\]: a object cannot be kept"),
    ],
)
def test_what_is_no_state_is_refused_by_its_path(tmp_path: Path, state: Any, message: str) -> None:
    """The state before stays."""
    with opened(tmp_path / "memory") as memory:
        memory.flip({"n": 1})
        with pytest.raises(ConfigurationError, match=message):
            memory.flip(state)
        assert memory.load() == {"n": 1}


@each_file
@given(states, states, st.randoms(use_true_random=False), st.booleans())
def test_a_flip_cut_anywhere_leaves_a_whole_state(old: State, new: State, chance: random.Random, late: bool) -> None:
    """Early: some of the half's bytes are written, whichever. Late: all of them, and the first bytes of the slot."""
    with TemporaryDirectory() as place:
        path = Path(place, "memory")
        before, after = written(path, {"older": [0.5] * 9}, old), written(path, new)
        before = before.ljust(len(after), b"\0")
        changed = [at for at in range(len(after)) if before[at] != after[at]]
        header, half = [at for at in changed if at < PAGE], [at for at in changed if at >= PAGE]
        done = {*half, *header[: chance.randint(0, len(header))]} if late else {*chance.sample(half, len(half) // 2)}
        path.write_bytes(bytes(after[at] if at in done else before[at] for at in range(len(after))))
        assert bits(loaded(path)) == bits(new if done.issuperset(header) else old)
        written(path, {"next": 1})
        assert loaded(path) == {"next": 1}


@each_file
@given(st.lists(st.integers(0, 9000), min_size=1, max_size=8))
def test_halves_grow_and_never_touch_each_other(sizes: list[int]) -> None:
    """Until the slot is written the file holds the old state, whatever the sizes; and it stays in its bound."""
    with TemporaryDirectory() as place:
        path, copy = Path(place, "memory"), Path(place, "copy")
        old: State | None = None

        def the_old_state_is_whole() -> None:
            copy.write_bytes(path.read_bytes())
            assert bits(loaded(copy)) == bits(old)

        with opened(path, between=the_old_state_is_whole) as memory:
            for number, size in enumerate(sizes):
                state = {"x": torch.full((size,), number, dtype=torch.uint8)}
                memory.flip(state)
                old = state
                assert bits(memory.load()) == bits(state)
        assert path.stat().st_size <= 2 * PAGE + (max(sizes) + 99) * 25 // 8


def test_sizes_that_vary_a_little_keep_their_two_places(tmp_path: Path) -> None:
    """By up to an eighth: each half keeps to its place, and the file never needs room for a third one."""
    path, chance = tmp_path / "memory", random.Random(2)
    with opened(path) as memory:
        for _ in range(30):
            memory.flip({"x": torch.zeros(chance.randint(90_000, 100_000))})
    assert path.stat().st_size <= 3 * PAGE + 400_000 * 17 // 8


@given(st.integers(0), st.booleans())
def test_one_flipped_bit_never_makes_a_wrong_state(bit: int, in_the_slots: bool) -> None:
    """It is the newest state, or the one before and a notice, or an error where the file no longer says whose it is."""
    with TemporaryDirectory() as place:
        path = Path(place, "memory")
        size = len(written(path, {"n": 1}, {"n": 2}))
        slots = module._SLOTS_AT[0]
        at = 8 * slots + bit % (8 * (PAGE - slots)) if in_the_slots else bit % (8 * size)
        damage(path, at)
        with pytest.raises(ConfigurationError) if at < 8 * slots else nullcontext(), opened(path) as memory:
            assert memory.load() == {"n": 2} or (memory.load() == {"n": 1} and memory.notices)


def places(path: Path) -> tuple[int, int]:
    """Numbers of a bit in the older and in the newer half of a file."""
    content = written(path, {"n": "older"}, {"n": "newer"})
    return content.index(b"older") * 8, content.index(b"newer") * 8


@pytest.mark.parametrize("harm", [damage, lambda path, bit: os.truncate(path, bit // 8)], ids=["bit", "end"])
def test_a_damaged_half_is_replaced_by_the_one_before(tmp_path: Path, harm: Callable[[Path, int], None]) -> None:
    """The user is told, and the next flip leaves the good half alone until the other one is good again."""
    path = tmp_path / "memory"
    harm(path, places(path)[1])
    with opened(path) as memory:
        assert memory.load() == {"n": "older"}
        assert ["one half is damaged" in notice for notice in memory.notices] == [True]
        memory.flip({"n": "next"})
    with opened(path) as memory:
        assert (memory.load(), memory.notices) == ({"n": "next"}, [])


def test_two_damaged_halves_are_a_loss_that_is_told(tmp_path: Path) -> None:
    """Nothing is flipped over them in silence; who accepts the loss clears the memory."""
    path = tmp_path / "memory"
    damage(path, *places(path))
    with opened(path) as memory:
        with pytest.raises(DataLossError, match=rf"both halves of {path} are damaged.*had not sent"):
            memory.load()
        with pytest.raises(DataLossError, match="both halves"):
            memory.flip({"n": 3})
        memory.clear()
        memory.flip({"n": 3})
    assert loaded(path) == {"n": 3}


@pytest.mark.parametrize("sync", [False, True])
def test_cleared_memory_is_new(tmp_path: Path, sync: bool) -> None:
    """Its space is given back."""
    path = tmp_path / "memory"
    with opened(path, sync=sync) as memory:
        memory.flip({"x": torch.zeros(10_000)})
        memory.clear()
        assert memory.load() is None
        assert path.stat().st_size == PAGE
    assert loaded(path) is None


@pytest.mark.parametrize("size", [0, 1, 8, 9, PAGE - 1])
def test_a_file_that_died_young_is_new(tmp_path: Path, size: int) -> None:
    """A process may be killed before the header is whole."""
    path = tmp_path / "memory"
    path.write_bytes(written(path)[:size])
    assert loaded(path) is None


KILLS = 20

# Imports torch once; every worker that is killed is a fork. Each tells by a pipe which flips it has finished, and
# leaves a child behind, like those of a loader, which lives until the end.
KILLER = f"""
import os, random, signal, sys, time
from pathlib import Path
import torch
from thresher.worker.memory import Memory

torch.set_num_threads(1)
path, end = Path(sys.argv[1]), os.pipe()

def work(tell):
    if os.fork() == 0:
        os.close(end[1]), os.close(tell), os.read(end[0], 1), os._exit(0)
    memory = Memory(path, "killed")
    number = (memory.load() or {{"number": 0}})["number"]
    while number := number + 1:
        x = torch.full((50_000 + 40_000 * (number % 3),), number)
        memory.flip({{"number": number, "x": x, "y": x[:9]}})
        os.write(tell, number.to_bytes(8, "little"))

for trial in range({KILLS}):
    heard, tell = os.pipe()
    worker = os.fork()
    if worker == 0:
        work(tell)
    os.close(tell)
    told = os.read(heard, 8)
    time.sleep(random.uniform(0, 0.02))
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)
    last = int.from_bytes((told + os.read(heard, 1 << 20))[-8:], "little")
    memory = Memory(path, "killed")
    state = memory.load()
    assert state["number"] in (last, last + 1), (state["number"], last)
    assert all((state[name] == state["number"]).all() for name in "xy"), state
    assert not memory.notices, memory.notices
    memory.close()
    print(state["number"])
"""


def test_kill_9_at_any_moment_leaves_the_last_flip_or_the_one_in_flight(tmp_path: Path) -> None:
    """Also while a forked child of the dead worker lives on: the lock goes with the worker."""
    command = [sys.executable, "-c", KILLER, str(tmp_path / "memory")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, len(done.stdout.split())) == (0, KILLS), done.stderr


def test_the_memory_of_another_run_is_refused(tmp_path: Path) -> None:
    """The error shows both identities, and the file stays as it was."""
    path = tmp_path / "memory"
    content = written(path, {"n": 1})
    with pytest.raises(ConfigurationError, match=rf"{path} is the memory of '{RUN}', this worker is 'run 8'.*folder"):
        Memory(path, "run 8")
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [b"my thesis", b"my thesis" * 1000])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    """And not written to."""
    path = tmp_path / "memory"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match="is not the memory of a worker"):
        Memory(path, RUN)
    assert path.read_bytes() == content


def test_an_identity_has_a_longest_length(tmp_path: Path) -> None:
    """The longest one comes back; one more byte is refused."""
    for _ in range(2):
        Memory(tmp_path / "memory", "é" * 1532).close()
    with pytest.raises(ConfigurationError, match="more than 3064 bytes"):
        Memory(tmp_path / "other", "é" * 1532 + "x")


def test_a_full_disk_leaves_the_state_before(tmp_path: Path) -> None:
    """The limit on this process' files stands in for the disk; when there is room again, the run goes on."""
    path = tmp_path / "memory"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(path) as memory:
        memory.flip({"n": 1})
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
        try:
            with pytest.raises(MemoryFileError, match=rf"{path}: File too large.*is whole.*room on its disk"):
                memory.flip({"x": torch.zeros(1 << 20)})
            memory.flip({"n": 2})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert memory.load() == {"n": 2}
        memory.flip({"n": 3})
    assert loaded(path) == {"n": 3}


def test_two_processes_never_share_a_file(tmp_path: Path) -> None:
    """The second one is told; when the first one has ended, the file opens."""
    path = tmp_path / "memory"
    written(path, {"n": 1})
    holder = "import fcntl, sys; f = open(sys.argv[1], 'r+b'); fcntl.lockf(f, 2); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", holder, str(path)], stdin=-1, stdout=-1) as process:
        assert process.stdout
        process.stdout.readline()
        with pytest.raises(MemoryFileError, match=rf"{path} is open in another process"):
            Memory(path, RUN)
        process.kill()
    assert loaded(path) == {"n": 1}


def test_what_the_system_refuses_is_named(tmp_path: Path) -> None:
    """A folder that is missing; a memory that is closed, which may be closed once more."""
    with pytest.raises(MemoryFileError, match=r"absent/memory: No such file or directory.*folder exists"):
        Memory(tmp_path / "absent" / "memory", RUN)
    with opened(tmp_path / "memory") as memory:
        memory.close()
        with pytest.raises(MemoryFileError, match="Bad file descriptor"):
            memory.flip({})
