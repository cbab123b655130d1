"""What tests of shards that are lost in the middle of a call share."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from tests.worker.training import Cluster


def lose(served: Cluster, shard: int) -> None:
    """Kill a shard; it is back a little later, when somebody has looked for it in vain."""
    served.kill(shard)
    threading.Timer(0.3, served.start, [shard]).start()


def before_the_first(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, strike: Callable[[Any], bool]
) -> list[bool]:
    """Have ``strike`` called before each call of ``owner.name``, until it says that it has struck."""
    struck: list[bool] = []
    one_at_a_time = threading.Lock()
    call = getattr(owner, name)

    def called(one: Any, *args: Any, **options: Any) -> Any:
        with one_at_a_time:
            if not struck and strike(one):
                struck.append(True)
        return call(one, *args, **options)

    monkeypatch.setattr(owner, name, called)
    return struck
