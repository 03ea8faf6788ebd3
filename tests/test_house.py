"""The rules of the house, read from the source: who may import what, who takes inner steps, what modules carry."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = (
    "PIL",
    "accelerate",
    "lightning",
    "matplotlib",
    "prodigyopt",
    "pydantic",
    "rich",
    "sagemaker",
    "sagemaker_training",
    "schedulefree",
    "scipy",
    "sklearn",
    "transformers",
    "tyro",
    "wandb",
    "yaml",
)
MAX_LINES = 400

SOURCES = sorted(path for package in ("learned_opt", "tasks") for path in (ROOT / package).rglob("*.py"))
LIBRARY = [path for path in SOURCES if path.is_relative_to(ROOT / "learned_opt")]
PROGRAMS = sorted([*ROOT.glob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def tree_of(path: Path) -> ast.Module:
    # The oldest Python that pyproject.toml allows: newer syntax is an error here, whatever runs the tests.
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path), feature_version=(3, 10))


MODULES = {module_name(path): path for path in SOURCES}


def _targets(node: ast.Import | ast.ImportFrom, module: str, is_package: bool) -> Iterator[str]:
    """The modules that one statement imports; `from package import name` names the submodule where there is one."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    base = node.module or ""
    if node.level:
        here = module.split(".")
        here = here[: len(here) - node.level + is_package]
        base = ".".join([*here, *([node.module] if node.module else [])])
    for alias in node.names:
        submodule = f"{base}.{alias.name}"
        yield submodule if submodule in MODULES else base


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports_of(path: Path, *, when_imported: bool = False) -> set[str]:
    """Every module that a file imports; with `when_imported`, not those inside functions or under TYPE_CHECKING."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.update(_targets(node, module_name(path), path.name == "__init__.py"))
        if when_imported and (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or _is_type_checking(node)):
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree_of(path))
    return found


def under(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def ours(modules: set[str]) -> set[str]:
    return {
        name
        for name in modules
        if under(name, "learned_opt", "tasks", "benchmarks", "tests", "train_optimizer", "evaluate_optimizer")
    }


def test_the_parser_sees_what_is_there():
    # Guards the other tests: a parser that finds nothing would let everything pass.
    assert {"learned_opt.task", "learned_opt.unroll", "learned_opt.rules.lstm", "tasks.quadratic"} <= set(MODULES)
    seen = imports_of(MODULES["learned_opt.rules.lstm"])
    assert {"torch", "learned_opt.rules.base", "learned_opt.rules.features", "learned_opt.task"} <= seen


# Who may know whom. Longest matching prefix first; "allowed" are the project's own modules, besides its own package.
ALLOWED: dict[str, tuple[str, ...]] = {
    "learned_opt.task": (),
    "learned_opt.distributed": (),
    "learned_opt.meta_loss": (),
    "learned_opt.truncation": (),
    "learned_opt.program": (),
    "learned_opt.batched": ("learned_opt.program", "learned_opt.task"),
    "learned_opt.rules": ("learned_opt.task",),
    "learned_opt.particles": (
        "learned_opt.batched",
        "learned_opt.rules.base",
        "learned_opt.rules.context",
        "learned_opt.task",
        "learned_opt.truncation",
    ),
    "learned_opt.segment": (
        "learned_opt.particles",
        "learned_opt.rules.inplace",
        "learned_opt.task",
        "learned_opt.turning",
    ),
    "learned_opt.unroll": (
        "learned_opt.batched",
        "learned_opt.particles",
        "learned_opt.rules.base",
        "learned_opt.rules.context",
        "learned_opt.rules.inplace",
        "learned_opt.segment",
        "learned_opt.task",
        "learned_opt.turning",
    ),
    "learned_opt.turning": (
        "learned_opt.particles",
        "learned_opt.rules.base",
        "learned_opt.rules.basis",
        "learned_opt.task",
    ),
    "learned_opt.estimators": (
        "learned_opt.batched",
        "learned_opt.distributed",
        "learned_opt.meta_loss",
        "learned_opt.particles",
        "learned_opt.rules",
        "learned_opt.segment",
        "learned_opt.task",
        "learned_opt.truncation",
        "learned_opt.unroll",
    ),
    "learned_opt.artifact": ("learned_opt._version", "learned_opt.files", "learned_opt.rules", "learned_opt.task"),
    "learned_opt": ("learned_opt",),
    "tasks": ("learned_opt.task",),
}
# The drop-in optimizer is for those who train, not meta-train: it may load no part of meta-training.
OPTIMIZER_NEVER = tuple(
    f"learned_opt.{name}"
    for name in (
        "batched",
        "distributed",
        "estimators",
        "evaluation",
        "meta_trainer",
        "particles",
        "segment",
        "unroll",
        "truncation",
    )
)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_only_what_stands_below(module):
    rule = max((name for name in ALLOWED if under(module, name)), key=len)
    own = () if rule == "learned_opt" else (rule,)
    wrong = [name for name in ours(imports_of(MODULES[module])) if not under(name, *ALLOWED[rule], *own)]
    assert not wrong, f"{module} must not import {wrong}: {rule} may import {ALLOWED[rule] or 'nothing of ours'}"


@pytest.mark.parametrize("path", LIBRARY, ids=module_name)
def test_library_never_imports_tasks_or_programs(path):
    wrong = [name for name in ours(imports_of(path)) if not under(name, "learned_opt")]
    assert not wrong, f"{module_name(path)} imports {wrong}; learned_opt stands below tasks/ and the programs"


def test_dropin_optimizer_loads_no_part_of_meta_training():
    if "learned_opt.optimizer" not in MODULES:
        pytest.fail("learned_opt/optimizer.py is missing")
    seen, todo = set(), ["learned_opt.optimizer"]
    while todo:
        module = todo.pop()
        if module in seen or module not in MODULES:
            continue
        seen.add(module)
        todo += ours(imports_of(MODULES[module]))
    wrong = [module for module in seen if under(module, *OPTIMIZER_NEVER)]
    assert not wrong, f"learned_opt.optimizer reaches {wrong}"


def test_no_import_cycles():
    graph = {name: ours(imports_of(path, when_imported=True)) - {name} for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, "import cycle: " + " -> ".join([*trail[trail.index(module) :], module])
        if module in done:
            return
        for target in sorted(graph.get(module, ())):
            # A package's __init__ collects its own files; they may not need it in return.
            visit(target, (*trail, module))
        done.add(module)

    for module in graph:
        visit(module, ())


# Inner steps: a gradient of a task's loss together with one application of an update rule.
# `optimizer`, `coordinates` and `traced` are the drop-in optimizer's step; exact backprop and imitation replay the
# rule over steps that the unroll has taken; `evaluation.replay` feeds it gradients that belong to no task.
STEPPERS = (
    "learned_opt.rules",
    "learned_opt.unroll",
    "learned_opt.optimizer",
    "learned_opt.coordinates",
    "learned_opt.traced",
    "learned_opt.estimators.backprop",
    "learned_opt.estimators.imitation",
    "learned_opt.evaluation.replay",
)


def rule_applications(tree: ast.AST) -> list[int]:
    """Lines that apply an update rule: `chunked_update`, `….rule.update`, `.update` of four positional arguments."""
    lines = []
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="chunked_update") | ast.Attribute(attr="chunked_update")):
                lines.append(node.lineno)
            case ast.Call(func=ast.Attribute(attr="update"), args=args):
                if len(args) >= 4:
                    lines.append(node.lineno)
            case ast.Attribute(attr="update", value=ast.Name(id=owner) | ast.Attribute(attr=owner)):
                if owner.strip("_").endswith("rule"):
                    lines.append(node.lineno)
    return lines


def test_only_the_unroll_takes_inner_steps():
    assert rule_applications(tree_of(MODULES["learned_opt.unroll"])), "the check no longer sees the unroll's own steps"
    wrong = {
        module_name(path): lines
        for path in [*SOURCES, *ROOT.glob("*.py")]
        if not under(module_name(path), *STEPPERS) and (lines := rule_applications(tree_of(path)))
    }
    assert not wrong, f"an update rule is applied outside {STEPPERS}: {wrong}; call learned_opt.unroll instead"


def test_only_the_unroll_asks_for_gradients_of_tasks():
    allowed = ("learned_opt.batched", "learned_opt.particles", "learned_opt.unroll", "learned_opt.estimators.backprop")
    callers = {
        module_name(path)
        for path in [*SOURCES, *ROOT.glob("*.py")]
        if any(isinstance(n, ast.Attribute) and n.attr == "losses_and_grads" for n in ast.walk(tree_of(path)))
    }
    assert "learned_opt.unroll" in callers
    assert not [name for name in callers if not under(name, *allowed)]


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_extras_are_imported_when_used(path):
    wrong = [name for name in imports_of(path, when_imported=True) if under(name, *EXTRAS)]
    assert not wrong, f"{module_name(path)} imports {wrong} at its top; import it inside the function that needs it"


_IMPORT_WITHOUT = """
import importlib, sys, warnings

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

BLOCKED = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Blocked())
warnings.simplefilter("error")
for name in sys.argv[2:]:
    importlib.import_module(name)
print("imported", len(sys.argv) - 2)
"""


def import_without(blocked: tuple[str, ...], *modules: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _IMPORT_WITHOUT, ",".join(blocked), *modules]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_core_imports_with_torch_and_numpy_alone():
    result = import_without((*EXTRAS, "safetensors"), "learned_opt", "tasks")
    assert result.returncode == 0, result.stderr


def test_every_module_imports_without_the_extras():
    result = import_without(EXTRAS, *sorted(MODULES))
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["imported", str(len(MODULES))]


def test_blocking_an_import_works():
    result = import_without(("wandb", "json"), "json")
    assert result.returncode != 0
    assert "No module named 'json'" in result.stderr


@pytest.mark.parametrize("path", [*SOURCES, *PROGRAMS], ids=module_name)
def test_modules_stay_short(path):
    count = len(path.read_text(encoding="utf-8").splitlines())
    assert count <= MAX_LINES, f"{path.relative_to(ROOT)} has {count} lines: split it, one concern a module"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_every_public_name_has_a_docstring(path):
    tree = tree_of(path)
    missing = [] if not tree.body or ast.get_docstring(tree) else ["the module itself"]
    module = importlib.import_module(module_name(path))
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            missing.append(node.name)
        if isinstance(node, ast.ClassDef):
            # `getdoc` follows inheritance: a method that overrides needs no second text.
            methods = [item.name for item in node.body if isinstance(item, ast.FunctionDef)]
            owner = getattr(module, node.name)
            missing += [
                f"{node.name}.{name}"
                for name in methods
                if not name.startswith("_")
                and not inspect.getdoc(inspect.getattr_static(owner, name))
                and not inspect.getdoc(getattr(owner, name))
            ]
    assert not missing, f"{path.relative_to(ROOT)}: no docstring for {missing}"


def _dataclass_decorator(node: ast.ClassDef) -> ast.expr | None:
    for decorator in node.decorator_list:
        name = decorator.func if isinstance(decorator, ast.Call) else decorator
        if ast.unparse(name) in ("dataclass", "dataclasses.dataclass"):
            return decorator
    return None


def test_configurations_are_frozen_and_keyword_only():
    checked, wrong = [], []
    for path in [*SOURCES, *ROOT.glob("*.py")]:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
                decorator = _dataclass_decorator(node)
                settings = {
                    k.arg
                    for k in getattr(decorator, "keywords", [])
                    if isinstance(k.value, ast.Constant) and k.value.value
                }
                checked.append(node.name)
                if not {"frozen", "kw_only"} <= settings:
                    wrong.append(f"{module_name(path)}.{node.name}")
    assert "LSTMRuleConfig" in checked
    assert not wrong, f"declare with @dataclass(frozen=True, kw_only=True): {wrong}"


_DRAWS = {"bernoulli", "multinomial", "normal", "poisson", "rand", "randint", "randn", "randperm"}
_DRAWS_IN_PLACE = {"bernoulli_", "cauchy_", "exponential_", "log_normal_", "normal_", "random_", "uniform_"}


def global_randomness(tree: ast.AST) -> list[str]:
    """Uses of a global generator: `torch.randn`, `.normal_` without generator, numpy and Python module functions."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name, text = node.func.attr, ast.unparse(node.func)
            explicit = any(k.arg == "generator" for k in node.keywords)
            draws = (text == f"torch.{name}" and name in _DRAWS) or name in _DRAWS_IN_PLACE
            seeds = text in ("torch.manual_seed", "torch.seed", "torch.cuda.manual_seed", "torch.cuda.manual_seed_all")
            # numpy's classes (Generator, SeedSequence, PCG64) and a seeded default_rng are explicit.
            numpy = re.fullmatch(r"(np|numpy)\.random\.[a-z]\w*", text) is not None
            if (draws and not explicit) or seeds or (numpy and not (name == "default_rng" and node.args)):
                found.append(f"line {node.lineno}: {text}")
        if isinstance(node, ast.Import) and any(alias.name == "random" for alias in node.names):
            found.append(f"line {node.lineno}: import random")
    return found


def test_global_randomness_is_recognized():
    bad = [
        "torch.randn(3)",
        "x.normal_()",
        "np.random.rand()",
        "torch.manual_seed(0)",
        "import random",
        "np.random.default_rng()",
    ]
    good = [
        "torch.randn(3, generator=g)",
        "torch.Generator().manual_seed(0)",
        "np.random.default_rng(0)",
        "np.random.SeedSequence(1)",
    ]
    assert all(global_randomness(ast.parse(text)) for text in bad)
    assert not any(global_randomness(ast.parse(text)) for text in good)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_no_global_randomness(path):
    found = global_randomness(tree_of(path))
    assert not found, f"{path.relative_to(ROOT)}: pass a torch.Generator instead of {found}"


@pytest.mark.parametrize("path", [*SOURCES, *PROGRAMS], ids=module_name)
def test_no_pickle_is_loaded(path):
    imported = [name for name in imports_of(path) if under(name, "pickle", "cloudpickle", "dill", "joblib", "shelve")]
    assert not imported, f"{module_name(path)} imports {imported}"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            safe = {k.arg: ast.unparse(k.value) for k in node.keywords}.get("weights_only")
            assert safe == "True", f"{module_name(path)}:{node.lineno}: torch.load needs weights_only=True"


# Written in pieces, so that this file does not hold what it forbids.
_MACHINE_PATH = re.compile(
    r"(?<![\w.$})/-])/(?:wo" r"rk|ro" r"ot|ho" r"me/\w+|Us" r"ers/\w+|tmp/ba" r"sh_jobs)(?:/|\b)"
)
_REGISTRY = re.compile(r"\b(?:py" r"pi\.org|pytho" r"nhosted\.org|download\.py" r"torch\.org|find-" r"links\s*=)")
_TEXT = {"", ".cfg", ".ini", ".json", ".md", ".py", ".toml", ".txt", ".yaml", ".yml"}


def project_files() -> list[Path]:
    folders = ("learned_opt", "tasks", "tests", "benchmarks", "docs", ".ci", ".github")
    found = [path for path in ROOT.iterdir() if path.is_file()]
    found += [path for name in folders for path in (ROOT / name).rglob("*") if path.is_file()]
    return [path for path in found if path.suffix in _TEXT and "__pycache__" not in path.parts and path.name != ".git"]


def test_no_paths_of_one_machine_and_no_registry_hosts():
    files = project_files()
    assert ROOT / "pyproject.toml" in files
    found = []
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if _MACHINE_PATH.search(line) or _REGISTRY.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert not found, "\n".join(found)


def test_machine_paths_are_recognized():
    start = "/wo" + "rk"
    assert _MACHINE_PATH.search(f"open('{start}/x')")
    assert _MACHINE_PATH.search(f"see {start}")
    assert not _MACHINE_PATH.search(f"frame{start}")
    assert not _MACHINE_PATH.search("$HOME" + start)
