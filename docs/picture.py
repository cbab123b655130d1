"""Draws docs/images/*.svg from real runs, as a terminal shows them.

python docs/picture.py launch      # the live display in the middle of a run, and the table at its end
python docs/picture.py top         # the same run as another terminal watches it
python docs/picture.py ray-status  # four shards on three nodes of a Ray cluster, while two workers train
"""

import io
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from thresher.deploy.display import Picture, table_of
from thresher.deploy.launch import launch
from thresher.deploy.launch_config import LaunchConfig
from thresher.deploy.results import results_table
from thresher.deploy.stop_signals import StopSignals
from thresher.deploy.top import Follower
from thresher.deploy.watching import Watch
from thresher.deploy.watching_places import Access, find
from thresher.worker import Method

ROOT = Path(__file__).parent.parent
DIGITS = str(ROOT / "examples" / "digits.py")


def draw(name: str, console: Console, title: str) -> None:
    drawing = console.export_svg(title=title)
    # Without the fonts that it would load over the network: any monospaced one will do.
    drawing = re.sub(r"@font-face \{[^}]*\}|<!--.*?-->", "", drawing, flags=re.DOTALL)
    (ROOT / "docs" / "images").mkdir(exist_ok=True)
    (ROOT / "docs" / "images" / f"{name}.svg").write_text(drawing, encoding="utf-8")


def screen() -> Console:
    return Console(record=True, width=100, force_terminal=True, file=io.StringIO())


def draw_launch() -> None:
    pictures: list[Picture] = []
    config = LaunchConfig((DIGITS,), shards=2, workers=4, method=Method(density=0.01), baseline=True)
    with tempfile.TemporaryDirectory() as folder, StopSignals() as stop:
        results = launch(config, Path(folder), pictures.append, stop)
    sparse = [picture for picture in pictures if picture.title.startswith("sparse") and picture.shards]
    console = screen()
    console.print("$ thresher launch --shards 2 --workers 4 --density 0.01 --baseline examples/digits.py\n")
    console.print(table_of(min(sparse, key=lambda picture: abs(picture.shards[0].version - 240))))
    console.print()
    console.print(results_table(results))
    draw("launch", console, "thresher launch")


def draw_top() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "runs" / "digits"
        options = f"--shards 2 --workers 4 --density 0.01 --runs {run.parent} --name {run.name}".split()
        command = [sys.executable, "-m", "thresher.deploy", "launch", *options, DIGITS, "--epochs", "30"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as launched:
            while not (run / "launch.json").exists():
                time.sleep(0.1)
            os.chdir(folder)
            place = find(str(Path("runs", "digits")), Access())
            with Watch(place, "the picture", 5.0) as watch:
                follower, view = Follower(place, watch), None
                while view is None or view.looks[0].statistics is None or view.looks[0].statistics.version < 240:
                    time.sleep(0.5)
                    view = follower.view(5.0)
            console = screen()
            console.print("$ thresher top\n")
            console.print(view.drawing(console))
            launched.wait()
            os.chdir(ROOT)
    draw("top", console, "thresher top")


def draw_ray_status() -> None:
    from thresher.deploy.ray_cluster import RayConfig, commands, down, status, up  # noqa: PLC0415 - the other needs none
    from thresher.deploy.ray_cluster.local import local_cluster  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as folder, local_cluster(num_cpus=0) as cluster:
        for _ in range(3):
            cluster.add_node(num_cpus=2)
        up(RayConfig("digits", 4, method=Method(density=0.01), state_dir=Path(folder), insecure=True))
        environment = {
            **os.environ,
            "RAY_ADDRESS": cluster.address,
            "THRESHER_SHARDS": "ray://digits",
            "THRESHER_WORKERS": "2",
        }
        workers = [
            subprocess.Popen([sys.executable, DIGITS], env={**environment, "THRESHER_RANK": str(rank)})
            for rank in range(2)
        ]
        while (shards := status("digits"))[0].version < 200:
            time.sleep(0.1)
        console = screen()
        console.print("$ thresher ray status digits\n")
        commands.show("digits", shards, console)
        for worker in workers:
            worker.wait()
        down("digits")
    draw("ray-status", console, "thresher ray status")


if __name__ == "__main__":
    {"launch": draw_launch, "top": draw_top, "ray-status": draw_ray_status}[sys.argv[1]]()
