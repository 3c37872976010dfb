"""Who may import whom: the rooms of the package depend on each other downwards only."""

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "asit_hf"
HUB_FILES = ("configuration_asit", "fbank_asit", "feature_extraction_asit", "modeling_asit")
# from the lowest level up; a room imports from lower levels and from itself
LEVELS = (
    HUB_FILES,
    ("utils",),
    ("loading",),
    ("data", "plotting"),
    ("evaluation", "hub"),
    ("finetuning", "pretraining"),
    ("pipeline",),
    ("corpus",),
    ("convert_original", "embed", "fit", "predict"),
    ("listen",),
)
# of the standard library of the oldest Python that the package admits, but not of 3.12 or 3.13
REMOVED_MODULES = {
    *("aifc", "asynchat", "asyncore", "audioop", "cgi", "cgitb", "chunk", "crypt", "distutils", "imghdr"),
    *("imp", "lib2to3", "mailcap", "msilib", "nis", "nntplib", "ossaudiodev", "pipes", "smtpd", "sndhdr", "spwd"),
    *("sunau", "telnetlib", "uu", "xdrlib"),
}
# that versions of transformers to come change or empty; the files on the Hub must load with all of them
MOVING_MODULES = ("transformers.audio_utils", "transformers.feature_extraction_sequence_utils")
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
SCRIPTS = [path for folder in ("asit_hf", "examples", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]


def walk(node: ast.AST, into_functions: bool) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        if into_functions or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from walk(child, into_functions)


def imports(path: Path, into_functions: bool = True) -> Iterator[tuple[str, str | None]]:
    """(absolute module, name) of every import of a file; the name is `None` for `import a`."""
    package = path.relative_to(ROOT).parent.parts
    for node in walk(ast.parse(path.read_text()), into_functions):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            for alias in node.names:
                submodule = f"{module}.{alias.name}"
                yield (submodule, None) if submodule in MODULES else (module, alias.name)


def room_of(module: str) -> str:
    """The room of a module of the package; "asit_hf" for the package itself."""
    return ".".join(module.split(".")[1:2]) or "asit_hf"


def in_package(path: Path, into_functions: bool = True) -> set[str]:
    """Modules of the package that a file imports."""
    return {module for module, _ in imports(path, into_functions) if module.split(".")[0] == "asit_hf"}


def test_every_room_has_a_level():
    rooms = {room_of(module) for module in MODULES} - {"asit_hf"}
    assert rooms <= set(LEVEL_OF)


@pytest.mark.parametrize("module", [module for module in MODULES if module != "asit_hf"])
def test_rooms_import_downwards(module):
    room = room_of(module)
    upwards = [
        other
        for other in in_package(MODULES[module])
        if room_of(other) != room and (other == "asit_hf" or LEVEL_OF[room_of(other)] >= LEVEL_OF[room])
    ]
    assert not upwards or room in HUB_FILES  # these have a rule of their own, below


def test_no_circle_of_imports():
    """Imports inside functions are lazy exports and do not count."""
    TopologicalSorter({module: in_package(path, into_functions=False) for module, path in MODULES.items()}).prepare()


@pytest.mark.parametrize("name", HUB_FILES)
def test_files_that_travel_to_the_hub_import_only_each_other_torch_numpy_and_transformers(name):
    allowed = {*sys.stdlib_module_names, "torch", "numpy", "transformers", "huggingface_hub"}  # transformers needs it
    for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
            assert node.module in HUB_FILES
        elif isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] in allowed
        elif isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed


def test_private_names_stay_in_their_room():
    taken = [
        (str(path.relative_to(ROOT)), module, name)
        for path in SCRIPTS
        if "tests" not in path.relative_to(ROOT).parts
        for module, name in imports(path)
        if module.startswith("asit_hf.") and name and name.startswith("_") and not name.startswith("__")
        if path not in MODULES.values() or path.relative_to(PACKAGE).with_suffix("").parts[0] != room_of(module)
    ]
    assert not taken


def test_init_files_hold_exports_only():
    for path in PACKAGE.rglob("__init__.py"):
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        defined = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, kinds)]
        assert set(defined) <= {"__getattr__", "__dir__"}, path


def test_no_file_changes_the_module_search_path():
    for path in SCRIPTS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("sys.path.insert", "sys.path.append", "sys.path.extend"), path


def test_nothing_imports_modules_that_newer_pythons_lack():
    for path in SCRIPTS:
        assert not {module.split(".")[0] for module, _ in imports(path)} & REMOVED_MODULES, path


def test_the_package_imports_nothing_that_is_about_to_move():
    for path in MODULES.values():
        assert not [module for module, _ in imports(path) if module.startswith(MOVING_MODULES)], path


def test_the_package_imports_no_examples_or_tests():
    for path in MODULES.values():
        assert not {module.split(".")[0] for module, _ in imports(path)} & {"examples", "tests"}
