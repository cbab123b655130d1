"""Whoever reaches a shard may say anything: it costs the shard nothing that lasts, and honest workers no bit."""

import gc
import json
import logging
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Final, cast, final

import grpc
import numpy as np
import pytest
import torch
from tests.server import conversing
from tests.server.conversing import SECONDS, Conversation, Served, frame_of, push, reached_at
from tests.worker.training import abandon
from torch import Tensor, nn

from thresher.deploy.in_process import in_process
from thresher.protos.codec import frame_bytes_bound
from thresher.protos.layout import Layout, TensorSpec
from thresher.v1 import aggregation_pb2 as pb
from thresher.worker import Method, Session, Settings, connect

NUMEL: Final = 1000
INSIDER: Final = 2  # the third rank: a member with nothing to say, which speaks for all that
STRANGERS: Final = 3
CODE = grpc.StatusCode
MILLION: Final = 1_000_000
UNBEARABLE: Final = 10  # ways in which a member ends its stream
FORMS: Final = 13  # and a stranger its own
PAYLOAD_BOUND: Final = frame_bytes_bound(NUMEL)
REFUSED: Final = (CODE.INVALID_ARGUMENT, CODE.FAILED_PRECONDITION, CODE.INTERNAL, CODE.UNKNOWN, CODE.RESOURCE_EXHAUSTED)

Message = pb.ExchangeRequest | bytes

_logger = logging.getLogger(__name__)


@final
class Tally:
    """Counts what was said, from several threads."""

    def __init__(self) -> None:
        """Begin at none."""
        self._lock = threading.Lock()
        self.said = 0

    def add(self, number: int) -> None:
        """So many more."""
        with self._lock:
            self.said += number


@contextmanager
def shard(folder: Path) -> Iterator[tuple[str, int]]:
    """Serve in a process of its own; yield its address and its process."""
    command = [sys.executable, "-m", "thresher.deploy", "serve", "--workers", "3", "--until-stdin-closes"]
    with (folder / "told").open("w", encoding="utf-8") as told:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=told, text=True, cwd=folder
        )
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())["address"], process.pid
        finally:
            process.kill()
            process.communicate()


def resident_mb(process: int) -> float:
    """Return the memory that a process holds now."""
    status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def worker(address: str, rank: int) -> tuple[Session, nn.Parameter, torch.optim.Optimizer]:
    """Return a session that has joined, its parameter and its optimizer."""
    settings = Settings((address,), rank, 3, method=Method(threshold=0.5))
    parameter = nn.Parameter(torch.zeros(NUMEL))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    session = connect(settings=settings)
    session.wrap(nn.ParameterList([parameter]), optimizer)
    return session, parameter, optimizer


def first_life(address: str) -> int:
    """Let rank 0 bring the starting values and be killed; return its incarnation, which is old when it comes back."""
    session, _, _ = worker(address, 0)
    incarnation = session._rounds.shards[0].client.registration.incarnation
    abandon(session)
    return incarnation


def train(address: str, rank: int, rounds: int) -> Tensor:
    """Train honestly; return the parameters."""
    session, parameter, optimizer = worker(address, rank)
    with session:
        for step in range(rounds):
            drawn = np.random.default_rng((rank, step)).normal(size=NUMEL)
            parameter.grad = torch.from_numpy(drawn.astype(np.float32))
            optimizer.step()
    return parameter.detach()


# The insider, whose pushes are judged


def rejected(step: int, number: int) -> list[pb.ExchangeRequest]:
    """Return one push that is refused, while its stream goes on."""
    forms: list[Callable[[], list[pb.ExchangeRequest]]] = [
        lambda: push(2**63 + number, frame_of(1.0, NUMEL)),
        lambda: push(step + 1 + number, b"", skipped=True),
        lambda: push(step, frame_of(float("nan"), NUMEL)),
        lambda: push(step, frame_of(float("inf"), NUMEL)),
        lambda: push(step, frame_of(1.0, NUMEL), version=2**64 - 1),
        lambda: push(step, b"", skipped=True, next_threshold=float("nan")),
        lambda: push(step, b"", skipped=True, next_threshold=-1.0),
    ]
    return forms[number % len(forms)]()


def unbearable(step: int, number: int) -> list[pb.ExchangeRequest]:
    """Return what ends a member's stream."""
    noise = np.random.default_rng((step, number)).bytes(200)
    odd = pb.Override(group=7, name="lr", value=pb.Value(number=1.0))
    forms: list[Callable[[], list[pb.ExchangeRequest]]] = [
        lambda: push(step, noise),
        lambda: push(step, frame_of(1.0, NUMEL + 1)),
        lambda: push(step, frame_of(1.0, NUMEL), announced=2**62),
        lambda: push(step, frame_of(1.0, NUMEL), announced=3),
        lambda: push(step, frame_of(1.0, NUMEL), announced=PAYLOAD_BOUND) + push(step, b"", skipped=True),
        lambda: push(step, b"", skipped=True, presence=b"\xff" * (1 << 20)),
        lambda: push(step, b"", skipped=True, overrides=[odd]),
        lambda: [pb.ExchangeRequest(agree=pb.Agree(number=99, values={"x": 1.0}))],
        lambda: [pb.ExchangeRequest(hello=pb.Hello(rank=INSIDER))],
        lambda: [pb.ExchangeRequest(leave=pb.Leave(), payload_bytes=5, chunk=noise[:5])],
    ]
    assert len(forms) == UNBEARABLE
    return forms[number % UNBEARABLE]()


@final
class Insider:
    """A member that skips every round, after it has said what is no push."""

    def __init__(self, address: str, served: Served) -> None:
        """Register as a worker does, and take over from it."""
        session, _, _ = worker(address, INSIDER)
        client = session._rounds.shards[0].client
        self._registration, self._history = client.registration, client.history
        abandon(session)
        self._served = served

    def _talk(self) -> Conversation:
        at = self._history
        self._served.stub.Register(self._registration, timeout=SECONDS)
        hello = pb.Hello(
            rank=INSIDER, incarnation=self._registration.incarnation, run=at.run, version=at.version, digest=at.digest
        )
        return self._served.talk(pb.ExchangeRequest(hello=hello))

    def take_part(self, rounds: int, mischief: int, tally: Tally, end: threading.Event) -> None:
        """Skip each round, after ``mischief`` messages; the last round waits for ``end``."""
        try:
            self._take_part(rounds, mischief, tally, end)
        except BaseException as error:  # or the honest ones would wait for it
            self._talk().say(pb.ExchangeRequest(abort=pb.Abort(reason=repr(error))))
            raise

    def _take_part(self, rounds: int, mischief: int, tally: Tally, end: threading.Event) -> None:
        talk = self._talk()
        for step in range(rounds):
            for begin in range(0, mischief, 100):  # hears what it is told: 100 answers wait at most
                some = [rejected(step, number) for number in range(begin, min(begin + 100, mischief))]
                talk.say(*(message for messages in some for message in messages))
                for _ in some:
                    assert talk.hear().result.verdict == pb.VERDICT_REJECTED
                tally.add(len(some))
            if mischief:
                last = unbearable(step, step)
                talk.say(*last)
                code, _ = talk.hear_refusal()
                assert code in REFUSED
                tally.add(len(last))
                talk = self._talk()
            while step == rounds - 1 and not end.wait(SECONDS / 3):  # no stream lasts for longer than SECONDS
                talk.break_off()
                talk = self._talk()
            talk.say(*push(step, b"", skipped=True))
            update = talk.hear()
            assert update.update.version == step + 1
            assert list(update.update.contributors) == [0, 1]
            self._history.version, self._history.digest = step + 1, update.update.digest
        talk.say(pb.ExchangeRequest(leave=pb.Leave()))
        assert talk.hear().HasField("left")


# Strangers, who are not even registered


def hello(rank: int, incarnation: int = 99, **fields: Any) -> pb.ExchangeRequest:
    """Say who one is not."""
    said = pb.Hello(rank=rank, incarnation=incarnation, run=incarnation, version=incarnation, digest=b"?" * 16)
    return pb.ExchangeRequest(hello=said, **fields)


def conversation(number: int, fenced: int) -> Iterator[Message]:
    """Yield what a stranger says on one stream; most of it are pieces of payloads that are never complete."""
    draw = np.random.default_rng(number)
    noise = draw.bytes(100)
    piece = pb.ExchangeRequest(chunk=b"x")
    forms: list[list[Message]] = [
        [hello(0, payload_bytes=PAYLOAD_BOUND), *[piece] * (PAYLOAD_BOUND - 1)],
        [*push(0, frame_of(1.0, NUMEL), announced=PAYLOAD_BOUND), *[pb.ExchangeRequest()] * 1000, noise],
        [hello(1, payload_bytes=2, chunk=b"xy"), *push(0, frame_of(1.0, NUMEL))],
        [hello(1, payload_bytes=1, chunk=b"xy")],
        [hello(0, fenced), *push(0, frame_of(1.0, NUMEL))],
        [hello(2**32 - 1, 2**64 - 1), *push(2**63, b"", skipped=True)],
        [hello(0, payload_bytes=2**64 - 1)],
        [*push(0, frame_of(float("nan"), NUMEL))],
        [pb.ExchangeRequest(chunk=noise)],
        [hello(1).SerializeToString() + b"\xfa\x3e\x03odd"],  # a field that nobody knows
        [b"\xfa\x3e\x03odd"],
        [noise],
        [hello(0).SerializeToString(), noise],
    ]
    assert len(forms) == FORMS
    yield from forms[number % FORMS]


def seed(number: int) -> Iterator[Message]:
    """Yield a seed of noise, by who may not seed."""
    noise = np.random.default_rng(number).bytes(10)
    for _ in range(100):
        yield pb.SeedRequest(rank=1, incarnation=99, total_bytes=1000 + number % 2, chunk=noise).SerializeToString()


def as_bytes(message: Any) -> bytes:
    """Write a message, or noise as it is."""
    return message if isinstance(message, bytes) else bytes(message.SerializeToString())


def utter(channel: grpc.Channel, some: list[Message], *, seeding: bool) -> grpc.StatusCode:
    """Say this on one stream; return how it ended."""
    path = "/thresher.v1.AggregationService/"
    try:
        if seeding:
            seed_: Any = channel.stream_unary(path + "Seed", as_bytes, None)
            seed_(iter(some), timeout=SECONDS)
        else:
            exchange: Any = channel.stream_stream(path + "Exchange", as_bytes, None)
            list(exchange(iter(some), timeout=SECONDS))
    except grpc.RpcError as error:
        return cast("grpc.Call", error).code()
    return CODE.OK


def molest(address: str, first: int, messages: int, fenced: int, tally: Tally) -> set[grpc.StatusCode]:
    """Say so many messages, on one stream after the other; return how they ended."""
    ends: set[grpc.StatusCode] = set()
    with grpc.insecure_channel(address, (("grpc.use_local_subchannel_pool", 1),)) as channel:
        said, numbers = 0, count(first, STRANGERS)
        while said < messages:
            number = next(numbers)
            seeding = number % 10 == 9
            some = list(seed(number) if seeding else conversation(number, fenced))[: messages - said]
            ends.add(utter(channel, some, seeding=seeding))
            said += len(some)
            tally.add(len(some))
    return ends


def besieged(address: str, messages: int, rounds: int, tally: Tally) -> list[Tensor]:
    """Train with two honest workers and an insider, while strangers say half of ``messages``, and the insider half."""
    end = threading.Event()
    fenced = first_life(address)
    with reached_at(address) as served, ThreadPoolExecutor(3 + STRANGERS) as pool:
        honest = [pool.submit(train, address, rank, rounds) for rank in (0, 1)]
        insider = pool.submit(lambda: Insider(address, served).take_part(rounds, messages // 2 // rounds, tally, end))
        strangers = [
            pool.submit(molest, address, first, messages // 2 // STRANGERS, fenced, tally)
            for first in range(STRANGERS if messages else 0)
        ]
        try:
            for stranger in strangers:
                assert stranger.result() <= set(REFUSED)
        finally:
            end.set()
        insider.result()
        return [one.result() for one in honest]


def standing() -> Counter[str]:
    """Count what calls are made of, as far as the shards of this process still hold it."""
    return Counter(
        name for one in gc.get_objects() if (name := type(one).__name__) in ("RPCState", "Stream", "Payload", "Task")
    )


def offend(served: Served, address: str) -> None:
    """Say all that ends a stream, as a stranger and as a member; break off, which ends one too; and be refused."""
    with grpc.insecure_channel(address) as channel:
        for number in range(FORMS):
            assert utter(channel, list(conversation(number, 0)), seeding=False) in REFUSED
        assert utter(channel, list(seed(0)), seeding=True) in REFUSED
    for number in range(UNBEARABLE):
        talk = served.talk(conversing.hello(INSIDER), *unbearable(0, number))
        assert talk.hear_refusal()[0] in REFUSED
        talk.stop_talking()
    talk = served.talk(conversing.hello(INSIDER))
    served.wait_until(INSIDER, "exchanging")
    talk.break_off()
    served.wait_until(INSIDER, "lost")
    with pytest.raises(grpc.RpcError):
        served.register(INSIDER, workers=4)


def test_what_is_refused_is_let_go_at_once() -> None:
    """Not when the garbage collector comes by: it counts objects, and a refused message of a megabyte is one."""
    layout = Layout((TensorSpec("w", (NUMEL,), "float32"),))
    with in_process(shards=1, workers=3) as cluster, reached_at(cluster.addresses[0]) as served:
        insider = served.join(workers=3, layout=layout)[INSIDER]
        served.wait_until(INSIDER, "exchanging")
        insider.break_off()
        served.wait_until(INSIDER, "lost")
        gc.collect()
        before = standing()
        gc.disable()
        try:
            offend(served, cluster.addresses[0])
            deadline = time.monotonic() + SECONDS
            while (more := standing() - before) and time.monotonic() < deadline:
                time.sleep(0.05)  # the shard lets go of a call a little later than its caller hears of the end
        finally:
            gc.enable()
    assert not more, more


def quiet(rounds: int) -> list[Tensor]:
    """Return what the honest workers come to when nobody is hostile."""
    with in_process(shards=1, workers=3) as cluster:
        return besieged(cluster.addresses[0], 0, rounds, Tally())


def test_two_thousand_hostile_messages() -> None:
    """Noise, wrong sizes, strangers, old lives, NaN, huge steps: the honest workers come to the same bits."""
    tally = Tally()
    with in_process(shards=1, workers=3) as cluster:
        found = besieged(cluster.addresses[0], 2_000, 4, tally)
    assert tally.said >= 1_990
    assert all(torch.equal(one, other) for one, other in zip(found, quiet(4), strict=True))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_million_hostile_messages(tmp_path: Path) -> None:
    """The same, much longer, and the shard's memory after a tenth of it is its memory at the end."""
    tally, over = Tally(), threading.Event()
    seen: list[tuple[int, float]] = []

    def watch() -> None:
        with reached_at(address) as served:
            while not over.wait(1.0):
                if tally.said >= len(seen) * MILLION // 10:
                    seen.append((tally.said, resident_mb(process)))
                    steps = [one.steps for one in served.statistics().workers]
                    _logger.info("%d messages, %.1f MB, steps %s", *seen[-1], steps)

    with shard(tmp_path) as (address, process), ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        try:
            found = besieged(address, MILLION, 200, tally)
        finally:
            over.set()
        watching.result()
        seen.append((tally.said, resident_mb(process)))
    _logger.info("%d messages, %.1f MB: the end", *seen[-1])
    assert tally.said >= 0.99 * MILLION
    assert seen[-1][1] - seen[1][1] < 8, seen
    assert all(torch.equal(one, other) for one, other in zip(found, quiet(200), strict=True))
