"""What tests of calls and conversations share: a registration, a proxy that cuts connections."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from thresher.protos.consistency import Consistency
from thresher.protos.layout import Layout, TensorSpec
from thresher.protos.messages import consistency_to_message, layout_to_message, optimizer_to_message
from thresher.protos.optimizers import OptimizerSpec
from thresher.v1 import aggregation_pb2 as pb

LAYOUT = Layout((TensorSpec("a", (3,), "float32"),), (TensorSpec("mean", (2,), "float32"),))
SGD = OptimizerSpec("SGD", ({"lr": 1.0, "weight_decay": 0.0},))
INCARNATION = 7


def registration(**changes: Any) -> pb.RegisterRequest:
    fields: dict[str, Any] = {
        "rank": 0,
        "workers": 1,
        "incarnation": INCARNATION,
        "shard": 0,
        "shards": 1,
        "layout": layout_to_message(LAYOUT),
        "fingerprint": LAYOUT.fingerprint,
        "optimizer": optimizer_to_message(SGD),
        "method": "everything",
        "consistency": consistency_to_message(Consistency()),
    }
    return pb.RegisterRequest(**{**fields, **changes})


def unused_address() -> str:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{reserved.getsockname()[1]}"


def wait_until(happened: Callable[[], bool]) -> None:
    """Return as soon as it has happened."""
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


class Proxy:
    """A TCP connection that can be cut after so many bytes, in the middle of whatever is on its way.

    Args:
        target: ``host:port`` of the shard.
    """

    def __init__(self, target: str) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        self._left: dict[str, int] = {}
        self._held_until = 0.0
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True, name="proxy").start()

    def cut_after(self, count: int, *, upstream: bool) -> None:
        """Reset all connections when ``count`` more bytes have gone to the shard, or come from it."""
        with self._lock:
            self._left["up" if upstream else "down"] = count

    def cut(self) -> None:
        """Reset all connections now; new ones are let through."""
        with self._lock:
            self._left.clear()
            self.cuts += 1
            broken, self._open = self._open, []
        for one in broken:
            with contextlib.suppress(OSError):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def hold(self, seconds: float) -> None:
        """Cut, and let nothing through for a while."""
        self._held_until = time.monotonic() + seconds
        self.cut()

    def close(self) -> None:
        """Cut everything, and let nothing through any more."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if time.monotonic() < self._held_until:
                near.close()
                continue
            host, _, port = self._target.rpartition(":")
            try:
                far = socket.create_connection((host, int(port)), timeout=5)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            with self._lock:
                self._open += [near, far]
            for source, sink, way in ((near, far, "up"), (far, near, "down")):
                threading.Thread(target=self._pump, args=(source, sink, way), daemon=True, name="proxy").start()

    def _pump(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        try:
            while data := source.recv(1 << 14):
                with self._lock:
                    left = self._left.get(way)
                    if left is not None:
                        self._left[way] = left - len(data)
                if left is not None and left < len(data):
                    sink.sendall(data[:left])
                    self.cut()
                    return
                sink.sendall(data)
        except OSError:
            pass
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
