"""Functions that a configuration names as `module:function`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastgrpo.errors import UserError, described, shown
from fastgrpo.ranks.deadlines import within

# For a module's own code, which may read a model.
IMPORT_S = 600.0


def find_function(name: str, key: str) -> Callable[..., Any]:
    """The function called `module:function` in the configuration's `key`, also of a file in the present folder.

    Raises UserError. The process ends where the module's own code hangs.
    """
    module, _, function = name.strip().partition(":")
    if not module or not function:
        raise UserError(f"{key} names functions as module:function, got {name!r}")
    if module.endswith(".py"):
        file = Path(module).with_suffix("")
        plain = file.name if file.is_absolute() or ".." in file.parts else ".".join(file.parts)
        raise UserError(
            f"{key} names functions as module:function, got {name!r}: write {plain}:{function}, which is looked for in "
            "the present folder and in PYTHONPATH"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    late = f"the module {module} has not been imported in {IMPORT_S:g} s: what takes long belongs into {function}"
    try:
        with within(IMPORT_S, f"{key}: {late}"):
            found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        own = isinstance(error, ModuleNotFoundError) and error.name in (module, module.partition(".")[0])
        where = f" in {os.getcwd()} or PYTHONPATH: name a file there, without .py" if own else ""
        raise UserError(f"{key}: the function {name} cannot be imported: {error}{where}") from error
    except (Exception, SystemExit) as error:
        # The module's own code runs.
        raised = described(error)
        raise UserError(f"{key}: the function {name} cannot be imported, its module raises {raised}") from error
    if not callable(found):
        raise UserError(f"{key}: {name} is no function, but {shown(found)}")
    return found
