"""Which tests run where: `gpu` needs CUDA, `interpreter` TRITON_INTERPRET=1, `compile_only` Triton without it."""

import importlib.util
import os
import re

import pytest
import torch
from exact_interpreter import spare_needless_work

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETING:
    spare_needless_work()
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers already fill the cores


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--representative", action="store_true", help="of every compile_only test only the first case for each GPU"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """An interpreting process runs the interpreter tests and nothing else; any other process runs everything else."""
    belongs = {item: bool(item.get_closest_marker("interpreter")) == INTERPRETING for item in items}
    if config.getoption("representative"):
        names = {item: re.match(r"[^[]+(\[(sm|gfx)\w+)?", item.nodeid)[0] for item in items}  # function and GPU
        first = {names[item]: item for item in reversed(items)}
        for item in items:
            belongs[item] &= first[names[item]] is item or not item.get_closest_marker("compile_only")
    config.hook.pytest_deselected(items=[item for item in items if not belongs[item]])
    items[:] = [item for item in items if belongs[item]]
    items.sort(
        key=lambda item: item.path.name != "test_interpreter.py"
    )  # the longest first, so that workers end together
    no_cuda = pytest.mark.skip(reason="needs a CUDA GPU")
    no_triton = pytest.mark.skip(reason="needs triton")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_cuda)
        if item.get_closest_marker("compile_only") and importlib.util.find_spec("triton") is None:
            item.add_marker(no_triton)
