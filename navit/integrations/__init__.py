"""Existing models and their weights on these kernels: a file per package, which imports that package when asked to run.

Importing navit, or a file of this folder, imports none of them.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from types import ModuleType


def require(package: str, minimum: str, extra: str) -> ModuleType:
    """Import an optional package. ImportError, saying what to install, where it is missing or older than minimum."""
    install = f"install it with: pip install 'navit-kernels[{extra}]'"
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"navit.integrations needs {package} >= {minimum} ({error}); {install}") from error
    version = importlib.metadata.version(package.replace("_", "-"))
    found, wanted = ([int(part) for part in re.findall(r"\d+", text)[:3]] for text in (version, minimum))
    if found < wanted:
        raise ImportError(f"navit.integrations needs {package} >= {minimum}, found {version}; {install}")
    return module
