"""SIGTERM: a worker sends everything with its next step, leaves, and exits with 143; the others go on."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from tests.worker.training import Scale, cluster, set_gradients, sgd
from torch import Tensor

from thresher.worker import Method, Session
from thresher.worker.termination import EXIT_STATUS, Termination


@pytest.fixture(autouse=True)
def usual_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


def test_only_the_usual_effect_is_replaced() -> None:
    """A handler of the script's own stays, and everything is given back."""
    termination = Termination(lambda _: None)
    termination.listen()
    os.kill(os.getpid(), signal.SIGTERM)
    assert termination.noticed
    termination.ignore()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for act in (termination.listen, termination.ignore):
        act()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def test_another_thread_hears_nothing() -> None:
    """Signals belong to the main thread; sessions on others work without."""
    termination = Termination(lambda _: None)
    thread = threading.Thread(target=termination.listen)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    termination.ignore()


def test_forked_children_end_at_once() -> None:
    """A child that was forked later has no step to finish: SIGTERM ends it, as ever."""
    termination = Termination(lambda _: None)
    termination.listen()
    children = multiprocessing.get_context("fork")
    ready = children.Event()

    def sleep() -> None:
        ready.set()
        time.sleep(20)

    child = children.Process(target=sleep)
    child.start()
    assert ready.wait(10)
    child.terminate()
    child.join(10)
    code = child.exitcode
    child.kill()
    assert code == -signal.SIGTERM
    assert not termination.noticed
    termination.ignore()


@pytest.mark.parametrize("skipped", [False, True], ids=["gradient", "no gradient"])
def test_a_spot_notice(skipped: bool) -> None:
    """What was kept back goes out with one more step; nothing is lost, and the other worker makes its steps."""
    with cluster(2, 2, method=Method(threshold=2.5, nonfinite="skip")) as served:

        def other() -> Tensor:
            with served.connect(1) as session:
                model = Scale()
                optimizer = sgd(model, lr=1.0)
                session.wrap(model, optimizer)
                for _ in range(5):
                    set_gradients(model, 4.0)
                    optimizer.step()
                return model.bias.detach().clone()

        found: list[Tensor] = []
        thread = threading.Thread(target=lambda: found.append(other()))
        thread.start()
        session: Session = served.connect(0)
        model = Scale()
        optimizer = sgd(model, lr=1.0)
        session.wrap(model, optimizer)
        for _ in range(2):
            set_gradients(model, 1.0)
            optimizer.step()
        assert torch.equal(session.residual, torch.full((4,), 2.0))
        os.kill(os.getpid(), signal.SIGTERM)
        set_gradients(model, torch.nan if skipped else 1.0)
        with pytest.raises(SystemExit) as exit_:
            optimizer.step()
        assert exit_.value.code == EXIT_STATUS == 143
        assert not session.residual.any()
        thread.join()
        members = served.statistics().members
    assert [(member.state, member.steps) for member in members] == [("left", 3), ("left", 5)]
    # Three steps of two workers, two of one; worker 0 has sent 2 that it kept back, and 1 if there was a gradient.
    assert torch.equal(found[0], torch.full((2,), -(3 * 4 + 2 + (not skipped)) / 2 - 2 * 4.0))
