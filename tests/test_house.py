"""The laws of the house, as far as a program can keep them."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[1]
FEMFED = ROOT / "femfed"
CONF = ROOT / "conf"
MODULES = sorted(FEMFED.rglob("*.py"))

# Room -> what of ours it may import. `femfed` itself (the errors) and `seeds` are open to all.
OURS = {
    "config": {"command_line", "hints"},
    "command_line": {"hints"},
    "hints": set(),
    "models": set(),
    "checkpoint": set(),
    "seeds": set(),
    "folder": set(),
    "results": {"folder", "checkpoint", "data.store", "engine", "report"},
    "report": {"report"},
    "data": {"data.store", "data.source"},
    # The two front doors: this one and simulate.py.
    "data.__main__": {"command_line", "config", "data", "engine.federation", "report.sheet"},
    "strategies": {"strategies.base", "strategies.columns"},
    "client": {"strategies.base", "models", "data.store", "forward", "deferred", "local"},
    "local": {"strategies.base"},
    "forward": {"deferred", "models"},
    "deferred": {"linear"},
    "linear": set(),
    "engine": {"engine", "client", "local", "data", "strategies.base", "models", "checkpoint"},
}
# Library -> the rooms that may import it.
LIBRARIES = {
    "hydra": {"config", "command_line"},
    "omegaconf": {"config", "hints", "data.__main__"},
    "yaml": {"config", "report.runs"},
    "tensorflow": {"client", "forward", "deferred"},
    "keras": {"forward", "deferred", "models"},
    "ray": {"engine.ray"},
    "flwr": {
        "engine.apps",
        "engine.inline",
        "engine.wire",
        "engine.ray",
        "engine.preload",  # by name
        "engine.dispatch",
        "strategies.flower",
    },
    "matplotlib": {"report", "report.plots", "report.sheet", "report.comparison"},
    "rich": {"report.progress"},
    "msgspec": {"data.leaf"},
    "h5py": {"data.tff"},
    "google": {"data.tff"},
    "PIL": {"data.fedscale", "report.sheet"},
}


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(FEMFED).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """Yield every module a file imports anywhere, `from a.b import c` as a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_a_room_imports_only_what_it_may(path: Path) -> None:
    here = dotted(path)
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top == "femfed" and rest and rest != "seeds":
            allowed = OURS.get(here, OURS[here.split(".")[0]])
            room = rest.split(".")[0]
            assert rest in allowed or room in allowed, f"{here} imports {name}"
        for library, rooms in LIBRARIES.items():
            if top == library:
                assert here in rooms, f"{here} imports {name}"


def test_no_strategy_imports_a_sibling_and_no_dataset_another() -> None:
    for room, shared in (("strategies", {"base", "columns"}), ("data", {"store", "source"})):
        for path in (FEMFED / room).glob("[!_]*.py"):
            siblings = [n for n in imports(path) if n.startswith(f"femfed.{room}.")]
            assert set(siblings) <= {f"femfed.{room}.{name}" for name in shared}, path


def test_nothing_is_called_utils() -> None:
    assert not [path for path in ROOT.rglob("*util*") if path.suffix == ".py" and ours(path)]


def test_no_global_random_state() -> None:
    forbidden = re.compile(
        r"np\.random\.(seed|rand|randn|randint|choice|shuffle|permutation|random)\b"
        r"|\bimport random\b|tf\.random\.|keras\.utils\.set_random_seed"
    )
    for path in [*MODULES, ROOT / "simulate.py"]:
        assert not forbidden.search(path.read_text()), path


def test_nothing_is_unpickled() -> None:
    for path in [*MODULES, ROOT / "simulate.py"]:
        text = path.read_text()
        assert not re.search(r"\bpickle\b|allow_pickle=True", text), path


def test_simulate_defines_nothing_that_runs_on_a_worker() -> None:
    text = (ROOT / "simulate.py").read_text()
    assert "ClientApp" not in text


def configs(group: str) -> list[Path]:
    return sorted((CONF / group).glob("*.yaml"))


@pytest.mark.parametrize(
    "path",
    [p for group in ("strategy", "model", "dataset") for p in configs(group)],
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_a_yaml_lists_exactly_the_fields_of_its_dataclass(path: Path) -> None:
    node = OmegaConf.load(path)
    module, _, name = node._target_.rpartition(".")
    made = getattr(importlib.import_module(module), name)
    # config.yaml has the keys that all datasets share.
    shared = OmegaConf.load(CONF / "config.yaml").get(path.parent.name, {})
    assert {str(key) for key in node} - {"_target_"} | set(shared) == {
        field.name for field in fields(made)
    }
    assert not set(node) & set(shared)
    assert path.read_text().startswith("# ")


def test_a_hyper_parameter_is_named_in_its_yaml_and_its_file_only() -> None:
    base = (FEMFED / "strategies" / "base.py").read_text()
    for path in configs("strategy"):
        node = OmegaConf.load(path)
        home = ROOT / Path(*node._target_.split(".")[:-1]).with_suffix(".py")
        for key in set(map(str, node)) - {"_target_"}:
            assert key not in base
            others = [p for p in [*MODULES, ROOT / "simulate.py"] if p != home]
            homes = {n for n in configs("strategy") if key in OmegaConf.load(n)}
            for other in others:
                if re.search(rf"\b{key}\b", other.read_text()):
                    assert other.parent.name == "strategies", f"{key} occurs in {other}"
            assert path in homes


def test_a_strategy_file_cites_its_source() -> None:
    for path in (FEMFED / "strategies").glob("*.py"):
        if path.stem != "__init__":
            assert "Source: " in path.read_text(), path
            assert "https://" in path.read_text(), path


def test_the_top_level_holds_nothing_else() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    names = {line.split("/")[0] for line in listed.splitlines()}
    expected = {"simulate.py", "conf", "femfed", "tests", "benchmarks", "docs", "pyproject.toml"}
    expected |= {"README.md", "README.ko.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"}
    assert names - expected <= {".ci", ".gitignore"}


def test_help_is_quick_because_it_imports_nothing_heavy() -> None:
    code = (
        "import sys, simulate; "
        "print({'tensorflow', 'keras', 'ray', 'flwr', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def ours(path: Path) -> bool:
    below = [parent for parent in path.parents if ROOT in parent.parents]
    return not any(
        folder.name.startswith(".") or folder.name == "outputs" or (folder / "pyvenv.cfg").exists()
        for folder in [path, *below]
    )
