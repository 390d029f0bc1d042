"""The house keeps its shape: every op has its rooms, imports point one way, and importing stays light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "navit_kernels"
OPS = sorted(init.parent.name for init in KERNELS.glob("*/__init__.py"))
ROOMS = [
    "navit_kernels/{}/reference.py",
    "navit_kernels/{}/kernel.py",
    "navit_kernels/{}/op.py",
    "tests/test_{}.py",
    "benchmarks/bench_{}.py",
]
OPTIONAL = {"timm", "transformers", "vit_pytorch", "flash_attn"}
MODEL_ONLY = {"navit", "PIL", "safetensors", "typer", "rich", "matplotlib"}


def imported_modules(path: Path) -> Iterator[str]:
    """Absolute names of what a file imports, anywhere in it; `from a import b` counts as a and as a.b."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def packages_after(statement: str) -> set[str]:
    """Top-level packages that a fresh interpreter holds after a statement."""
    command = [sys.executable, "-c", f"{statement}; import sys; print(*sys.modules)"]
    modules = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return {name.split(".")[0] for name in modules}


def test_the_four_steps_of_the_house_are_there() -> None:
    assert {"patches", "positions", "self_attention", "token_pooling"} <= set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_its_rooms(op: str) -> None:
    missing = [room.format(op) for room in ROOMS if not (ROOT / room.format(op)).exists()]
    assert not missing, f"{op} lacks {', '.join(missing)}"


@pytest.mark.parametrize("op", OPS)
def test_no_exported_function_hides_its_folder(op: str) -> None:
    names = {
        name for init in (KERNELS / "__init__.py", KERNELS / op / "__init__.py") for name in imported_modules(init)
    }
    assert not {name for name in names if name.endswith(f".{op}") and name != f"navit_kernels.{op}"}


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda path: str(path.relative_to(KERNELS)))
def test_imports_point_one_way(path: Path) -> None:
    modules = {tuple(name.split(".")) for name in imported_modules(path)}
    assert not {name for name in modules if name[0] == "navit"}, "navit_kernels knows no models"
    if path.stem.startswith(("kernel", "_jit")):
        assert not {name for name in modules if {"reference", "op"} & set(name)}, (
            "a kernel knows no reference and no op"
        )
    if path.stem.startswith("reference"):
        assert not {name for name in modules if {"kernel", "op", "triton"} & set(name)}, "a reference is plain torch"


def test_kernels_are_launched_where_replays_see_it() -> None:
    """kernel[grid](...) is for _jit.py alone, and for the hand-over to flash-attn, which no block makes."""
    launches = set()
    for path in KERNELS.rglob("*.py"):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        if any(isinstance(func, ast.Subscript) and not isinstance(func.value, ast.Call) for func in calls):
            launches.add(path.name)
    assert launches == {"_jit.py", "kernel_flash.py"}


def test_navit_kernels_imports_with_torch_alone() -> None:
    packages = packages_after("import torch; import navit_kernels")
    assert "navit_kernels" in packages
    assert not packages & {"triton", *MODEL_ONLY, *OPTIONAL}


def test_navit_and_its_integrations_import_without_optional_packages() -> None:
    integrations = (ROOT / "navit" / "integrations").glob("[!_]*.py")
    packages = packages_after(
        ", ".join(["import navit, navit.cli", *(f"navit.integrations.{path.stem}" for path in integrations)])
    )
    assert "navit" in packages
    assert not packages & {"triton", *OPTIONAL}
