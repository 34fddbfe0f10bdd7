"""Names of mixers, tasks and recipes without importing them; loading by name, entry point or loose file.

A mixer is named by the stem of its file in `mixers/`, by `package/name` for a third-party entry point in the group
`bench.mixers`, or by `path/to/file.py@ClassName`. Tasks and recipes follow the same rules. Listing reads file names
and docstrings only, so it does not import torch.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
import tomllib
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import TypeAdapter, ValidationError

from bench.errors import UserError, unknown

PACKAGES = {"mixer": "mixers", "task": "synthetic_tasks", "recipe": "bench.recipes"}
RESERVED = {"d_model", "layer", "pattern", "self"}


@cache
def package_dir(package: str) -> Path:
    """Folder of one of our packages, found without importing it."""
    root, *rest = package.split(".")
    spec = importlib.util.find_spec(root)
    assert spec is not None and spec.submodule_search_locations, package
    return Path(next(iter(spec.submodule_search_locations))).joinpath(*rest)


def names(kind: str) -> dict[str, str]:
    """Every installed mixer, task or recipe with the first line of its docstring."""
    found: dict[str, str] = {}
    for path in sorted(package_dir(PACKAGES[kind]).glob("[a-z]*.py")):
        if kind == "task" and f'@{kind}("' not in path.read_text():
            continue
        found[path.stem] = first_line(path)
    for point in _entry_points(kind):
        found[_entry_name(point)] = f"from {point.value}"
    return found


@cache
def first_line(path: Path) -> str:
    """First line of a module's docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.split("\n")[0]


def conversions() -> dict[str, str]:
    """Every conversion recipe with its summary, read from the files in `bench/convert/recipes/` alone."""
    files = sorted((package_dir("bench.convert") / "recipes").glob("*.toml"))
    return {path.stem: tomllib.loads(path.read_text(encoding="utf-8"))["summary"] for path in files}


def _entry_points(kind: str) -> list[EntryPoint]:
    return list(entry_points(group=f"bench.{kind}s"))


def _entry_name(point: EntryPoint) -> str:
    return f"{point.dist.name if point.dist else 'unknown'}/{point.name}"


def load(kind: str, name: str) -> Any:
    """The registered object: a Mixer class or layer pattern, a Task class, or a recipe function.

    Raises:
        UserError: no such name, or its module cannot be imported.
    """
    if "@" in name:
        return _load_loose(kind, name)
    if "/" in name:
        for point in _entry_points(kind):
            if _entry_name(point) == name:
                return _third_party(kind, name, point)
        raise unknown(kind, name, names(kind))
    if name not in names(kind):
        raise unknown(kind, name, names(kind), fix=f"A file of your own is named as ./file.py@Name; see `bench list {kind}s`.")
    module = importlib.import_module(f"{PACKAGES[kind]}.{name}")
    return _registered(module, kind, name)


def _registered(module: ModuleType, kind: str, name: str) -> Any:
    package = importlib.import_module(PACKAGES[kind])
    tables = {"mixer": ("REGISTRY", "LAYER_PATTERNS"), "task": ("TASKS",), "recipe": ("RECIPES",)}[kind]
    for table in tables:
        if name in getattr(package, table):
            found = getattr(package, table)[name]
            if found.__module__ != module.__name__:  # else a loose file would be trained and recorded as the zoo's
                other = getattr(sys.modules.get(found.__module__), "__file__", found.__module__)
                raise UserError(f"{other} and {module.__file__} both register the {kind} name {name!r}; change it in the former.")
            return found
    raise UserError(f"{module.__name__} does not register a {kind} named {name!r}; decorate it with @{kind}({name!r}).")


def _third_party(kind: str, name: str, point: EntryPoint) -> Any:
    try:
        return point.load()
    except Exception as error:
        raise UserError(f"The {kind} {name!r} ({point.value}) cannot be imported: {_one_line(error)}.") from error


def _load_loose(kind: str, name: str) -> Any:
    file, _, attribute = name.rpartition("@")
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"There is no file {file!r} for the {kind} {name!r}; write it as path/to/file.py@Name.")
    module = _import_file(path.resolve())
    if not hasattr(module, attribute):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        raise unknown(f"{kind} in {file}", attribute, own)
    return getattr(module, attribute)


@cache
def _import_file(path: Path) -> ModuleType:
    name = f"bench_loose_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path.name} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(f"{path.name} cannot be imported: {_one_line(error)}.") from error
    return module


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text}".rstrip(".")


def options_of(target: Any) -> dict[str, inspect.Parameter]:
    """The keyword options that a mixer, layer pattern, task or recipe takes."""
    parameters = inspect.signature(target).parameters
    return {name: p for name, p in parameters.items() if name not in RESERVED and p.kind is p.KEYWORD_ONLY}


def check_options(kind: str, name: str, target: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Options with the types that the target declares.

    Raises:
        UserError: an unknown option or a value of a wrong type.
    """
    allowed = options_of(target)
    hints = inspect.get_annotations(target.__init__ if inspect.isclass(target) else target, eval_str=True)
    checked: dict[str, Any] = {}
    for key, value in given.items():
        if key not in allowed:
            raise unknown(f"option of {kind} {name}", key, allowed)
        try:
            checked[key] = TypeAdapter(hints.get(key, Any)).validate_python(value)
        except ValidationError as error:
            raise UserError(
                f"Option {key} of {kind} {name} cannot be {value!r}: {error.errors()[0]['msg'].lower()} "
                f"(default {allowed[key].default!r})."
            ) from None
        if isinstance(checked[key], float) and not math.isfinite(checked[key]):
            raise UserError(
                f"Option {key} of {kind} {name} cannot be {value!r}; it has to be finite (default {allowed[key].default!r})."
            )
    return checked


def source_file(kind: str, name: str) -> Path:
    """The file that defines a mixer, task or recipe."""
    if "@" in name:
        return Path(name.rpartition("@")[0]).expanduser()
    if "/" in name:
        return Path(inspect.getfile(inspect.unwrap(load(kind, name))))
    return package_dir(PACKAGES[kind]) / f"{name}.py"


@cache
def source_hash(path: Path) -> str:
    """Hash of a file's code, the same in every Python; comments, docstrings and layout do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            node.body = body[1:] or [ast.Pass()]  # type: ignore[attr-defined]
    return hashlib.sha256(_dump(tree).encode()).hexdigest()[:12]


def _dump(node: object) -> str:
    """A syntax tree as text, without empty fields: `ast.dump` writes those that newer Pythons add, such as `type_params=[]`."""
    if isinstance(node, ast.AST):
        fields = (f"{name}={_dump(value)}" for name, value in ast.iter_fields(node) if value not in (None, []))
        return f"{type(node).__name__}({', '.join(fields)})"
    return f"[{', '.join(map(_dump, node))}]" if isinstance(node, list) else repr(node)
