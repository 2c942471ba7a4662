"""The laws of the house: a method is named in its own files only, and what is private elsewhere in compat/ only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import loraplex
from loraplex.methods import REGISTRY

ROOT = Path(loraplex.__file__).parent
OTHERS = ("peft", "transformers", "trl", "accelerate", "torch", "datasets")
# documented modules beside the top level
PUBLIC = {
    *OTHERS,
    *("torch.nn", "torch.nn.functional", "torch.utils.data", "torch.optim", "torch.distributed", "torch.autograd"),
    *("transformers.utils", "transformers.modeling_outputs", "torch.distributed.tensor", "datasets.utils"),
}


ORDINARY = {
    "add": "what a card's section does, and what presets combine with",
    "heads": "of a routed adapter, of an attention layer, and a command",
    "lora": "a word of PEFT's and of llama.cpp's formats",
    "magnitude": "a column of a report",
    "plain": "a word",
    "uniform": "how an initialization draws, and a control of a router",
}
"""Names of methods that are words for something else too."""


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for file in sorted(ROOT.rglob("*.py")):
        yield file.relative_to(ROOT), ast.parse(file.read_text(encoding="utf-8"))


def docstrings(tree: ast.Module) -> set[int]:
    """The ids of the constants that are docstrings, of fields too."""
    bodies = [node.body for node in ast.walk(tree) if isinstance(getattr(node, "body", None), list)]
    found = (entry.value for body in bodies for entry in body if isinstance(entry, ast.Expr))
    return {id(value) for value in found if isinstance(value, ast.Constant)}


def own_files() -> dict[str, set[str]]:
    """The names of methods, presets and classes of options, each with the modules that may know it."""
    found: dict[str, set[str]] = {}
    for method in REGISTRY.methods.values():
        for name in (method.name, method.options.__name__):
            found.setdefault(name, set()).update(cls.__module__ for cls in method.options.__mro__)
    for preset in REGISTRY.presets.values():
        parts = (method for method in REGISTRY.methods.values() if method.name in (preset.factors, preset.combine))
        found.setdefault(preset.name, set()).update(method.options.__module__ for method in parts)
    return found


def test_a_methods_name_stands_in_its_own_files_only() -> None:
    names = own_files()
    strays = []
    for path, tree in trees():
        module = ".".join(("loraplex", *path.with_suffix("").parts))
        if path.name == "__init__.py":
            continue
        texts = docstrings(tree)
        for node in ast.walk(tree):
            name = node.id if isinstance(node, ast.Name) and node.id[0].isupper() else None
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
                name = node.value
            if name in names and name not in ORDINARY and module not in names[name]:
                strays.append(f"{path}:{node.lineno}: {name}")
    assert strays == []


def test_what_other_libraries_keep_private_is_used_in_compat_only() -> None:
    ours, uses = set(), []
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                ours.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                ours.add(node.attr)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                ours.add(node.target.id)
            elif isinstance(node, ast.Assign):
                ours.update(target.id for target in node.targets if isinstance(target, ast.Name))
        if path.parts[0] == "compat":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in OTHERS:
                if node.module not in PUBLIC or any(alias.name.startswith("_") for alias in node.names):
                    uses.append((f"{path}:{node.lineno}", node.module))
            elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                uses.append((f"{path}:{node.lineno}", node.attr))
    private = [f"{place}: {name}" for place, name in uses if name.startswith(OTHERS) or name not in ours]
    # documented all the same: os._exit, and of named tuples _asdict
    assert [use for use in private if not use.endswith((": _exit", ": _asdict"))] == []
