"""The pages say what the code does: names exist, links resolve, options, metrics and the frame are those of today.

They are in the repository only; away from it there is nothing to hold against the code.
"""

import ast
import importlib
import re
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import typer
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from thresher.compression.catalogue import COMPRESSORS, FEEDBACKS
from thresher.compression.feedback import Where
from thresher.deploy.cli import app
from thresher.deploy.in_process import in_process
from thresher.protos.codec import encode
from thresher.protos.sparse import SparseGradient
from thresher.server.metrics import ShardMetrics
from thresher.v1 import aggregation_pb2, records_pb2
from thresher.worker import Method, Session, Settings
from thresher.worker.metrics import WorkerMetrics

ROOT = Path(__file__).parents[1]
PAGES = sorted(page for pattern in ("*.md", "docs/**/*.md", "[a-z]*/README.md") for page in ROOT.glob(pattern))

pytestmark = pytest.mark.skipif(not ROOT.joinpath("README.md").exists(), reason="the pages are in the repository")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

# What is named in backticks and is not ours.
FOREIGN = {
    *(
        "CI",
        "DataLoader",
        "GradScaler",
        "GRPC_ENABLE_FORK_SUPPORT",
        "DATA",
        "FOLDER",
        "OMP_NUM_THREADS",
        "TEST_OPTIONS",
    ),
    *("found_inf", "grad_scale", "load_state_dict", "state_dict", "call_soon_threadsafe", "param_groups", "atexit"),
    *("register_step_pre_hook", "register_step_post_hook", "register_state_dict_pre_hook"),
    *("ScalingConfig", "TorchTrainer", "prepare_data_loader", "prepare_model"),  # Ray Train's
    *("register_load_state_dict_pre_hook", "_step_supports_amp_scaling", "file_sd_configs", "job_name", "rate"),
}
FOREIGN_ROOTS = {"torch", "optimizer", "loss", "model", "loader", "grpc"}
# Variables of the pages' examples, and what they stand for.
VARIABLES = {"session": "Session", "feedback": "ErrorFeedback"}
FILE = re.compile(r"\.(py|pyi|md|toml|json|jsonl|proto|txt|log|safetensors|npz|svg|xz)$|/$")
DATA_FIELDS = {"train_x", "train_y", "test_x", "test_y", "residual_norm", "epochs", "accuracy"}


def code_files() -> Iterator[Path]:
    for root in importlib.import_module("thresher").__path__:
        yield from (path for path in sorted(Path(root).rglob("*.py")) if "_pb2" not in path.name)


@cache
def names() -> dict[str, set[str]]:
    """Every name of the code with the names inside it: modules, classes, functions, constants, fields, messages."""
    found: dict[str, set[str]] = {}
    for path in code_files():
        inside = found.setdefault(path.stem, set())
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            inside |= defined(node)
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, set()).update(members(node))
    for file in (aggregation_pb2.DESCRIPTOR, records_pb2.DESCRIPTOR):
        for message in file.message_types_by_name.values():
            found.setdefault(message.name, set()).update(message.fields_by_name)
    for service in aggregation_pb2.DESCRIPTOR.services_by_name.values():
        found.setdefault(service.name, set()).update(method.name for method in service.methods)
    return found


def defined(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def members(node: ast.ClassDef) -> set[str]:
    inside = {name for one in node.body for name in defined(one)}
    own = (one for one in ast.walk(node) if isinstance(one, ast.Attribute) and isinstance(one.ctx, ast.Store))
    return inside | {one.attr for one in own if isinstance(one.value, ast.Name) and one.value.id == "self"}


@cache
def known() -> set[str]:
    """All names, wherever they are, and those of the tests."""
    tests = (path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/test_*.py"))
    return {*names(), *(name for inside in names().values() for name in inside)} | {
        name for text in tests for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)
    }


def test_the_page_of_compressors_has_them_all() -> None:
    """Every method of the catalogue is in its tables, and what runs where is what the classes say."""
    text = (ROOT / "docs" / "compressors.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    cells = " ".join(cell for row in rows for cell in row)
    assert [name for name in (*COMPRESSORS, *FEEDBACKS) if f"`{name}`" not in cells] == []
    places = get_args(Where)
    told = {row[0].strip("`"): [cell == "yes" for cell in row[-len(places) :]] for row in rows if row[-1] == "yes"}
    assert told == {name: [place in method.runs_in for place in places] for name, method in FEEDBACKS.items()}


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def ticked(page: Path) -> set[str]:
    return set(re.findall(r"`([^`\n]+)`", prose(page)))


def missing(symbol: str) -> bool:
    """Whether ``symbol`` looks like a name of ours and is none."""
    call = re.sub(r"\(.*\)$", "", symbol)
    parts = call.split(".")
    if not all(re.fullmatch(r"[A-Za-z_]\w*", part) for part in parts) or FILE.search(symbol):
        return False
    if parts[0] == "thresher":
        return not resolves(parts) and symbol not in entry_points().groups
    if len(parts) > 1:
        first = VARIABLES.get(parts[0], parts[0])
        return first not in FOREIGN_ROOTS and parts[1] not in names().get(first, set())
    looks_ours = call != symbol or "_" in call.strip("_") or bool(re.search(r"[a-z][A-Z]", call))
    is_variable = call.startswith(("THRESHER_", "thresher_"))  # checked elsewhere
    return looks_ours and not is_variable and call not in known() | FOREIGN | DATA_FIELDS


def resolves(parts: list[str]) -> bool:
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        return all((found := getattr(found, part, None)) is not None for part in parts[length:])
    return False


@each_page
def test_every_name_of_ours_exists(page: Path) -> None:
    assert not sorted(symbol for symbol in ticked(page) if missing(symbol))


def test_a_name_that_does_not_exist_is_seen() -> None:
    wrong = [
        "thresher.directory",
        "Shard.handles",
        "Shrad.handle",
        "thresher.server.shards",
        "decode_all()",
        "MAX_BYTES_",
        "UpdateLogs",
    ]
    assert [symbol for symbol in wrong if not missing(symbol)] == []
    assert not missing("Shard.handle")
    assert not missing("thresher.directories")
    assert not missing("torch.optim.SGD")


@each_page
def test_every_path_in_the_repository_exists(page: Path) -> None:
    paths = {text for text in ticked(page) if re.fullmatch(r"(tests|docs|examples|benchmarks|protos)/[\w./]*", text)}
    assert not sorted(path for path in paths if not ROOT.joinpath(path).exists())


@each_page
def test_every_relative_link_resolves(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    broken = []
    for link in links:
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        path = page.parent / target if target else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(link)
    assert not broken


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def parameters() -> dict[str, list[Any]]:
    """What each command takes; typer hands out objects of the click that it has inside or beside it."""
    group: Any = typer.main.get_command(app)
    verbs = {
        f"{name} {verb}": inner
        for name, command in group.commands.items()
        for verb, inner in getattr(command, "commands", {}).items()
    }
    return {name: command.params for name, command in (group.commands | verbs).items()}


def options() -> dict[str, set[str]]:
    return {
        name: {option for param in params for option in (*param.opts, *param.secondary_opts)} | {"--help"}
        for name, params in parameters().items()
    }


@each_page
def test_every_option_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    everywhere = set().union(*options().values(), script_options())
    spoken = {option for one in ticked(page) for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", one)}
    assert not sorted(spoken - everywhere)
    commands = "|".join(sorted(options(), key=len, reverse=True))  # the longest first: some have verbs
    for command, arguments in re.findall(rf"thresher ({commands})\b((?: [^\s`]+)*)", text):
        own = re.split(r"\S+\.py\b", arguments)[0]
        assert not sorted(set(re.findall(r"--[a-z][a-z-]+", own)) - options()[command]), arguments


def script_options() -> set[str]:
    scripts = (
        path.read_text(encoding="utf-8") for path in (*ROOT.glob("examples/*.py"), *ROOT.glob("benchmarks/**/*.py"))
    )
    return {option for text in scripts for option in re.findall(r'"(--[a-z-]+)"', text)}


@each_page
def test_every_environment_variable_exists(page: Path) -> None:
    environment = set(Settings(("a:1",), 0, 1, state_dir=Path("a"), metrics_listen="a:2", rows=Path("a")).environment())
    environment |= {"THRESHER_TOKEN_FILE", "THRESHER_FAULTS"}  # not all of them are set at a time
    environment |= {f"THRESHER_{field.name.upper()}" for field in fields(Method)}  # not all of them are set at a time
    for param in (param for params in parameters().values() for param in params):
        environment |= {param.envvar} if isinstance(param.envvar, str) else {*(param.envvar or ())}
    found = set(re.findall(r"\bTHRESHER_[A-Z_]+\b", page.read_text(encoding="utf-8")))
    assert not sorted(found - environment)


@each_page
def test_every_make_target_exists(page: Path) -> None:
    makefile = ROOT.joinpath("Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    text = "\n".join([*ticked(page), *blocks(page, "console")])
    assert not sorted(set(re.findall(r"(?:^|\$ )make ([a-z-]+)", text, re.MULTILINE)) - targets)


def test_metrics_are_documented_as_they_are_scraped() -> None:
    """Name, type and labels of every metric, on both sides; nothing in the page that is not served."""
    shard, worker = scraped()
    page = ROOT.joinpath("docs", "metrics.md").read_text(encoding="utf-8")
    _, of_shard, of_worker, _ = re.split(r"^## (?:Shard|Worker|Queries)$", page, flags=re.MULTILINE)
    assert documented(of_shard) == shard
    assert documented(of_worker) == worker
    spoken = set(re.findall(r"\bthresher_[a-z_]+\b", page))
    suffixes = {"", "_sum", "_count", "_bucket"}
    assert not spoken - {name + suffix for name in (*shard, *worker) for suffix in suffixes}


def documented(section: str) -> dict[str, tuple[str, frozenset[str]]]:
    rows = re.findall(r"^\| `(thresher_\w+)` \| (\w+) \| [^|]+ \| ([^|]*) \|", section, re.MULTILINE)
    return {name: (kind, frozenset(re.findall(r"\w+", labels))) for name, kind, labels in rows}


def scraped() -> tuple[dict[str, tuple[str, frozenset[str]]], dict[str, tuple[str, frozenset[str]]]]:
    """What a shard and a worker serve after a step."""

    def work(session: Session) -> str:
        model = torch.nn.Linear(4, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        session.wrap(model, optimizer)
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        metrics = WorkerMetrics(session.statistics, "127.0.0.1:0")
        registry = CollectorRegistry()
        registry.register(metrics)
        text = generate_latest(registry).decode()
        metrics.close()
        return text

    with in_process(shards=1, workers=1, method=Method(threshold=0.1)) as cluster:
        (worker,) = cluster.run(work)
        (server,) = cluster.statistics()
        shard = ShardMetrics(lambda: server, lambda: 0)
        if server.last_row is not None:
            shard.observe(server.last_row)
        build = {"thresher_build_info": ("gauge", frozenset({"version"}))}
        return families(generate_latest(shard.registry).decode()), families(worker) | build


def families(text: str) -> dict[str, tuple[str, frozenset[str]]]:
    return {
        family.name + "_total" * (family.type == "counter"): (
            family.type,
            frozenset(label for sample in family.samples for label in sample.labels) - {"le", "quantile"},
        )
        for family in text_string_to_metric_families(text)
        if not family.name.endswith("_created")
    }


def test_the_diff_in_the_readme_is_the_one_of_the_example() -> None:
    """Every line of the diff is in the example, in its order, but for those it removes."""
    (diff,) = blocks(ROOT / "README.md", "diff")
    example = ROOT.joinpath("examples", "digits.py").read_text(encoding="utf-8")
    lines = iter([re.sub(r"  # \(\d\)$", "", line).strip() for line in example.splitlines()])
    ours = [line[1:].strip() for line in diff.splitlines() if line[1:].strip() not in {"", "..."} and line[0] != "-"]
    assert [line for line in ours if line not in lines] == []
    marked = re.findall(r"^\s*(.*?)  # \(\d\)$", example, re.MULTILINE)
    assert [line[1:].strip() for line in diff.splitlines() if line.startswith("+")] == marked


def test_the_worked_frame_is_a_frame() -> None:
    """The bytes in protos/README.md are those of the gradient that the text describes."""
    (block,) = blocks(ROOT / "protos" / "README.md", "hex")
    gradient = SparseGradient(torch.tensor([2, 7]), torch.tensor([1.0, -0.5]), numel=10)
    assert encode(gradient) == bytes.fromhex(block)


@each_page
def test_no_figure_is_left_out(page: Path) -> None:
    assert "@@" not in page.read_text(encoding="utf-8"), "a figure has not been measured yet"
