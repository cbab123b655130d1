"""What deploy/kuberay and docs/ray.md say, read for the tests: manifests, pods, commands."""

import re
import shlex
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "deploy" / "kuberay"


def manifests() -> dict[str, Any]:
    """Every object, by kind; there is one of each."""
    found = [one for path in sorted(KUBERAY.glob("*.yaml")) for one in yaml.safe_load_all(path.read_text("utf-8"))]
    by_kind = {one["kind"]: one for one in found}
    assert len(by_kind) == len(found)
    return by_kind


def groups() -> dict[str, Any]:
    spec = manifests()["RayCluster"]["spec"]
    return {"head": spec["headGroupSpec"]} | {group["groupName"]: group for group in spec["workerGroupSpecs"]}


def containers() -> dict[str, Any]:
    """Ray's container of each group, which is the first one."""
    return {name: group["template"]["spec"]["containers"][0] for name, group in groups().items()}


def commands(page: Path) -> list[str]:
    """The commands of a page's console blocks; `$ ` or `host$ ` begins one."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in re.findall(r"^\w*\$ (.*)$", block, re.MULTILINE)]


def run_sh() -> list[str]:
    text = (KUBERAY / "run.sh").read_text(encoding="utf-8").replace("\\\n", " ")
    return [line for line in text.splitlines() if not line.startswith("trap")]


def option(verb: str, name: str) -> str:
    """What run.sh gives to a command."""
    (line,) = (line for line in run_sh() if line.startswith(f"thresher ray {verb} "))
    words = shlex.split(line, comments=True)
    return words[words.index(name) + 1]
