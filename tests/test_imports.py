"""Heavy packages have a short list of files that may import them; everything else starts without loading them."""

import ast
import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for part in ("shared", "services") for path in (ROOT / part).rglob("*.py"))
HEAVY = ("torch", "faiss", "openvino", "tantivy", "verl", "lxml", "transformers", "ray", "sglang", "matplotlib")

VERLS = ("agent_loop", "early_workers", "search_tool", "cpu_platform", "cpu_rollout", "verl_trainer", "packed_engine")
# Files that may import the package, anywhere in them.
ANYWHERE = {
    "verl": {f"services/trainer/{name}.py" for name in VERLS} | {"services/trainer/verl_main.py"},
    "lxml": {"services/ingest/pubmed_xml.py"},
    "faiss": {"services/retrieval/faiss_index.py"},
    "openvino": {"services/retrieval/openvino_encoder.py"},
    "tantivy": {"services/retrieval/words.py"},
    "Stemmer": {"services/retrieval/terms.py"},
    "torch": {
        "services/retrieval/card_index.py",
        "services/retrieval/encoder.py",
        "services/retrieval/openvino_encoder.py",
        "services/retrieval/placement.py",
        "services/retrieval/rerank.py",
        "services/retrieval/torch_encoder.py",
        "services/trainer/publish.py",
        "services/trainer/cpu_platform.py",
        "services/trainer/cpu_rollout.py",
        "services/trainer/packed_engine.py",
        "services/trainer/token_log_probs.py",
        "services/trainer/varlen.py",
        "services/trainer/verl_trainer.py",
        "shared/generation.py",
        "shared/model_files.py",
        "shared/token_masks.py",
    },
}
# Files that may import it while they are themselves imported.
AT_TOP = {
    "verl": ANYWHERE["verl"] - {"services/trainer/verl_main.py"},
    "lxml": ANYWHERE["lxml"],
    "faiss": set[str](),
    "openvino": set[str](),
    "tantivy": set[str](),
    "torch": {
        f"services/trainer/{name}.py"
        for name in ("cpu_platform", "cpu_rollout", "packed_engine", "token_log_probs", "varlen", "verl_trainer")
    },
    "transformers": {"services/trainer/varlen.py"},
}
# Modules that load a heavy package, because they or what they import may. `services.trainer.plugin` is what verl's
# own workers import to register ours; on a CPU it loads them.
LOADS = {path.removesuffix(".py").replace("/", ".") for path in AT_TOP["verl"] | AT_TOP["torch"]}
LOADS |= {
    f"services.ingest.{name}" for name in ("pubmed_xml", "folder", "entrez", "eutils", "batches", "searches", "plan")
}
LOADS |= {"services.trainer.plugin"}

LIST_LOADED = """
import importlib, sys
for name in sys.argv[2].split(","):
    importlib.import_module(name)
    for heavy in sys.argv[1].split(","):
        if heavy in sys.modules:
            sys.exit(f"{name} loads {heavy}")
"""


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def packages_of(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
        return {node.module.split(".")[0]}
    return set()


def imported_anywhere(tree: ast.Module) -> set[str]:
    """Packages that a file imports, inside functions too, but not only for the type checker."""
    found: set[str] = set()
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        found |= packages_of(node)
        waiting += ast.iter_child_nodes(node)
    return found


def imported_at_top(tree: ast.Module) -> set[str]:
    """Packages that are imported with the file: every import outside a function."""
    found: set[str] = set()
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'"):
            continue
        found |= packages_of(node)
        waiting += ast.iter_child_nodes(node)
    return found


@pytest.mark.parametrize("package", ANYWHERE)
def test_a_heavy_package_is_imported_only_in_its_files(package: str) -> None:
    users = {place(path) for path in SOURCES if package in imported_anywhere(ast.parse(path.read_text("utf-8")))}
    assert users <= ANYWHERE[package]


@pytest.mark.parametrize("package", AT_TOP)
def test_a_heavy_package_is_imported_at_the_top_only_where_the_whole_file_is_about_it(package: str) -> None:
    users = {place(path) for path in SOURCES if package in imported_at_top(ast.parse(path.read_text("utf-8")))}
    assert users <= AT_TOP[package]


@pytest.mark.parametrize(
    "part", ["shared", "services.ingest", "services.retrieval", "services.solver", "services.trainer"]
)
def test_modules_start_without_loading_a_heavy_package(part: str) -> None:
    modules = [place(path).removesuffix(".py").replace("/", ".") for path in SOURCES]
    light = [name for name in modules if name.startswith(f"{part}.") and name not in LOADS]
    assert light
    environ = {k: v for k, v in os.environ.items() if not k.startswith("DRZERO_")}
    command = [sys.executable, "-c", LIST_LOADED, ",".join(HEAVY), ",".join(light)]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_files_on_the_lists_exist() -> None:
    listed = set().union(*ANYWHERE.values(), *AT_TOP.values())
    assert listed <= {place(path) for path in SOURCES}


# What libraries use when it happens to be there.
OPTIONAL = {
    "rich", "pygments", "markdown_it", "mdurl", "attr", "greenlet", "cloudpickle", "click", "_distutils_hack",
    "sniffio", "xxhash", "psutil", "orjson", "cryptography",
}  # fmt: skip


@pytest.mark.parametrize("service", ["ingest", "retrieval", "solver", "trainer"])
def test_a_service_needs_no_package_that_its_image_lacks(service: str) -> None:
    code = f"import sys, services.{service}.__main__; print(*{{name.partition('.')[0] for name in sys.modules}})"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    pins = (ROOT / "services" / service / "requirements.txt").read_text(encoding="utf-8")
    pinned = {line.partition("==")[0].lower() for line in pins.splitlines()}
    owners = packages_distributions()
    foreign = {
        name
        for name in set(loaded.split()) - OPTIONAL
        if name in owners and not any(re.sub(r"[_.]", "-", owner.lower()) in pinned for owner in owners[name])
    }
    assert foreign == set()
