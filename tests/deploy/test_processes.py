"""Child processes: what they print is kept, and they end when they should."""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from thresher.deploy.processes import Child, ReservedPort, end_all, kill_all, printed_data


def child(tmp_path: Path, code: str) -> Child:
    """Run Python code."""
    return Child("it", [sys.executable, "-u", "-c", code], dict(os.environ), tmp_path / "it.log")


def wait_for(tmp_path: Path, text: str) -> None:
    """Wait until the child has printed something."""
    deadline = time.monotonic() + 30
    while text not in (tmp_path / "it.log").read_text(encoding="utf-8"):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_output_is_logged_and_data_lines_are_kept(tmp_path: Path) -> None:
    """Everything goes to the log in order, both streams; JSON objects are data, the latest value of each key counts."""
    code = "import sys; print('{\"a\": 1}'); print('plain', file=sys.stderr); print('{not json'); print('{\"a\": 2}')"
    it = child(tmp_path, code)
    it.finish()
    assert it.code == 0
    assert it.data == {"a": 2}
    assert it.last_lines(2) == '{not json\n{"a": 2}'
    assert it.log.read_text(encoding="utf-8").splitlines()[1] == "plain"


def test_data_lines_are_written_down_with_their_times(tmp_path: Path) -> None:
    """Each with when it was printed, whatever the script itself calls a time; a further life adds to them."""
    path = tmp_path / "printed.jsonl"
    code = "print('{\"loss\": 1.5, \"time\": \"12 s\"}'); print('plain'); print('{no'); print('{\"a\": 2}')"
    begin = time.time()
    for _ in range(2):
        command = [sys.executable, "-u", "-c", code]
        Child("it", command, dict(os.environ), tmp_path / "it.log", printed=path).finish()
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    times = [row.pop("time") for row in rows]
    assert rows == [{"loss": 1.5}, {"a": 2}] * 2
    assert times == sorted(times)
    assert begin <= times[0] <= times[-1] <= time.time()


def test_endings_are_told(tmp_path: Path) -> None:
    """An exit code by number, a signal by name."""
    it = child(tmp_path, "raise SystemExit(3)")
    it.finish()
    assert it.ending() == "exit code 3"
    it = child(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    it.finish()
    assert it.ending() == "signal SIGKILL"


def test_a_full_disk_under_a_log_does_not_end_the_child(tmp_path: Path) -> None:
    """Its lines are lost; its data are heard, and it goes on to its end."""
    code = "for number in range(5000): print('{\"a\": %d}' % number)"
    full = Path("/dev/full")
    it = Child("it", [sys.executable, "-u", "-c", code], dict(os.environ), full, printed=full)
    it.finish()
    assert (it.code, it.data) == (0, {"a": 4999})


def test_a_deaf_child_is_killed(tmp_path: Path) -> None:
    """A child that ignores SIGTERM is killed when patience ends."""
    it = child(
        tmp_path, "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('x'); time.sleep(99)"
    )
    wait_for(tmp_path, "x")
    end_all([it], patience=0.2)
    assert it.ending() == "signal SIGKILL"


def test_grandchildren_end_too(tmp_path: Path) -> None:
    """What a child has started itself does not outlive it."""
    it = child(tmp_path, "import subprocess as s; p = s.Popen(['sleep', '99']); print(p.pid, flush=True); p.wait()")
    wait_for(tmp_path, "\n")
    grandchild = int(it.log.read_text(encoding="utf-8"))
    it.signal(signal.SIGKILL)
    end_all([it])
    deadline = time.monotonic() + 10
    while Path(f"/proc/{grandchild}/status").exists() and time.monotonic() < deadline:
        status = Path(f"/proc/{grandchild}/status").read_text(encoding="utf-8")
        if "State:\tZ" in status:  # dead, and waiting for init to notice
            break
        time.sleep(0.01)
    else:
        assert not Path(f"/proc/{grandchild}").exists()


def test_a_stray_grandchild_that_holds_the_pipe_is_not_waited_for(tmp_path: Path) -> None:
    """What a child left in a session of its own does not keep the launcher."""
    code = "import subprocess as s; print(s.Popen(['sleep', '60'], start_new_session=True).pid, flush=True)"
    it = child(tmp_path, code)
    it.finish()
    assert it.code == 0
    os.kill(int(it.log.read_text(encoding="utf-8")), signal.SIGKILL)
    it.finish()


def test_another_life_adds_to_the_log(tmp_path: Path) -> None:
    """What earlier lives have printed stays, and can be read back."""
    child(tmp_path, "print('{\"a\": 1}')").finish()
    it = child(tmp_path, "print('{no'); print('{\"b\": 2}')")
    it.finish()
    assert it.log.read_text(encoding="utf-8") == '{"a": 1}\n{no\n{"b": 2}\n'
    assert printed_data(it.log) == {"a": 1, "b": 2}
    assert printed_data(tmp_path / "no.log") == {}


def test_all_are_killed_whatever_they_wish(tmp_path: Path) -> None:
    """No SIGTERM, no patience."""
    it = child(
        tmp_path, "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('x'); time.sleep(99)"
    )
    wait_for(tmp_path, "x")
    kill_all([it])
    assert it.ending() == "signal SIGKILL"


def test_a_reserved_port_is_for_servers_only() -> None:
    """A server may listen, end, and listen again; who asks for any port, or for this one to call from, gets none."""
    port = ReservedPort()
    host, number = port.address.split(":")
    for _ in range(2):
        with socket.create_server((host, int(number))):
            pass
    with socket.socket() as caller, pytest.raises(OSError, match="in use"):
        caller.bind((host, int(number)))
    port.close()
    with socket.socket() as caller:
        caller.bind((host, int(number)))
