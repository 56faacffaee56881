"""How package and tests are laid out: what may import what, file lengths, no repeated runs."""

import ast
import collections
import graphlib
import itertools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jax_kvcache"
MAX_LINES = 260
REPEATED_RUN = 6

# From the bottom to the top: a module imports from its own layer and from those before it.  A
# name stands for the module or for everything in the package; the longest that fits counts.
LAYERS = [
    "version",
    "_compat",
    "ops.slots",
    "ops.indexing",
    "ops.explicit",
    "ops.checks",
    "ops.operands",
    "backends",
    "export",
    "ops.implementation",
    "mesh",
    "modes",
    "ops.operator",
    "ops.dequant_rope_quant_kvcache",
    "caches",
    "ops.decode_attention",
    "rope_frequencies",
    "rope_parameters",
    "rope",
    "tensor_parallel",
    "numerics",
    "model",
    "checkpoints",
    "testing",
    "cli",
    "__main__",
    "__init__",  # the public names; no module imports them from here
]

# What tests may import directly; everything else comes through support/internals.py.
PUBLIC_MODULES = ("checkpoints", "numerics", "model", "cli", "testing", "__main__")
INTERNALS = "support/internals.py"

# Repeated runs that stay, by the two modules (or one) and the run's first line, with the reason.
ALLOWED_RUNS: dict[tuple[tuple[str, ...], str], str] = {
    (("caches.contiguous", "caches.paged"), "num_kv_heads: int,"): "two signatures of one kind",
    (
        (
            "ops.dequant_rope_quant_kvcache.api",
            "ops.dequant_rope_quant_kvcache.explain",
        ),
        "bias: Columns | None = None,",
    ): "explain has the operator's signature",
}


def module_name(path):
    """The dotted name below `jax_kvcache`; a package's own file is the package's name."""
    *folders, name = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(folders if name == "__init__" and folders else [*folders, name])


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def is_package(module):
    return FILES[module].name == "__init__.py"


def ancestors(module):
    """The packages that contain a module, without the outermost one."""
    parts = module.split(".")
    return {".".join(parts[:i]) for i in range(1, len(parts))}


def absolute(module, node):
    """What a `from ... import` names, as a dotted name from `jax_kvcache` down, or None."""
    if node.level == 0:
        return node.module
    here = ["jax_kvcache", *([] if module == "__init__" else module.split("."))]
    up = node.level - is_package(module)
    base = here[: len(here) - up] if up else here
    return ".".join([*base, *([node.module] if node.module else [])])


def imported(module):
    """(line, module or None) of all that a module imports from the package, wherever it does.

    None stands for the package's own `__init__`: the package itself or a name that it defines.
    """
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = absolute(module, node)
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            root, _, rest = name.partition(".")
            if root != "jax_kvcache":
                continue
            while rest and rest not in FILES:  # a name that a module defines
                rest = rest.rpartition(".")[0]
            yield node.lineno, rest or None


def imports_of(module):
    """The modules of the package that importing this one runs, its own packages left out."""
    named = {name for _, name in imported(module) if name is not None}
    packages = set().union(*map(ancestors, named), set()) & set(FILES)
    return (named | packages) - ancestors(module) - {module}


def layer_of(module):
    """The index of a module's layer, or None where it has none."""
    parts = module.split(".")
    names = (".".join(parts[:i]) for i in range(len(parts), 0, -1))
    return next((LAYERS.index(name) for name in names if name in LAYERS), None)


def listed(found):
    return "\n" + "\n".join(found)


def test_the_import_graph_has_no_cycle():
    graph = {module: imports_of(module) for module in FILES}
    try:
        order = list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))
    assert set(order) == set(FILES)


def test_no_module_imports_the_packages_public_names():
    """They come from the modules that define them, so that the package's `__init__` is the top."""
    found = [
        f"{FILES[module].relative_to(ROOT)}:{line}"
        for module in FILES
        if module != "__init__"
        for line, name in imported(module)
        if name is None
    ]
    assert not found, listed(found)


def test_every_module_has_a_layer():
    """A package above several layers, such as `ops`, imports none of them."""
    found = [m for m in FILES if layer_of(m) is None and (imports_of(m) or not is_package(m))]
    assert not found, listed(found)


def test_no_module_imports_from_a_higher_layer():
    found = []
    for module in FILES:
        for name in sorted(imports_of(module)):
            above, below = layer_of(module), layer_of(name)
            if above is not None and below is not None and below > above:
                found.append(f"{module} ({LAYERS[above]}) imports {name} ({LAYERS[below]})")
    assert not found, listed(found)


@pytest.mark.parametrize("module", FILES)
def test_a_module_has_a_docstring_and_fits_on_few_pages(module):
    assert ast.get_docstring(TREES[module]), "the docstring says what the file owns"
    lines = FILES[module].read_text().count("\n")
    assert lines <= MAX_LINES


def skipped_lines(tree):
    """The numbers of lines that belong to docstrings, imports and overloads of a signature."""
    numbers = set()
    for node in ast.walk(tree):
        constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        overload = isinstance(node, ast.FunctionDef) and any(
            isinstance(name, ast.Name) and name.id == "overload" for name in node.decorator_list
        )
        if isinstance(node, ast.Import | ast.ImportFrom) or constant or overload:
            numbers.update(range(node.lineno, node.end_lineno + 1))
    return numbers


def code_lines(module):
    """(number, text) of a module's lines that say something: no blank, comment, bracket, import."""
    skipped = skipped_lines(TREES[module])
    for number, line in enumerate(FILES[module].read_text().splitlines(), start=1):
        text = line.strip()
        if number not in skipped and text.strip("()[]{},:") and not text.startswith("#"):
            yield number, text


def repeated_runs():
    """The longest runs of equal lines in two places: (modules, first line, where)."""
    lines = {module: list(code_lines(module)) for module in FILES}
    places = collections.defaultdict(list)  # the texts of a run: the places where it starts
    for module, numbered in lines.items():
        texts = [text for _, text in numbered]
        for i in range(len(texts) - REPEATED_RUN + 1):
            places[tuple(texts[i : i + REPEATED_RUN])].append((module, i))
    pairs = {
        (*first, *second)
        for found in places.values()
        for first, second in itertools.combinations(found, 2)
        if first[0] != second[0] or second[1] - first[1] >= REPEATED_RUN
    }
    for one, i, other, j in sorted(pairs):
        if (one, i - 1, other, j - 1) not in pairs:  # else the run starts before
            (line, text), (other_line, _) = lines[one][i], lines[other][j]
            where = f"{one}:{line} and {other}:{other_line}: {text}"
            yield tuple(sorted({one, other})), text, where


def test_no_six_lines_are_written_twice():
    found = [where for *key, where in repeated_runs() if tuple(key) not in ALLOWED_RUNS]
    assert not found, listed(found)


def test_allowed_runs_are_still_there():
    assert set(ALLOWED_RUNS) <= {(modules, line) for modules, line, _ in repeated_runs()}


def test_tests_reach_into_the_package_in_one_place():
    public = {
        alias.asname or alias.name
        for node in TREES["__init__"].body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    allowed = {f"jax_kvcache.{name}" for name in (*PUBLIC_MODULES, *public)} | {"jax_kvcache"}
    found = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        where = path.relative_to(ROOT / "tests").as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                top = ".".join(name.split(".")[:2])
                if name.startswith("jax_kvcache") and top not in allowed and where != INTERNALS:
                    found.append(f"{where}:{node.lineno}: {name}")
    assert not found, listed(found)
