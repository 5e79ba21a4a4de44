"""Imports a reward by its path: `package.module.name` or `file.py:name`."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from lightning_mpo.errors import UserError
from lightning_mpo.rewards.isolation import describe


def load_object(path: str) -> Any:
    """Import `package.module.name`, or `file.py:name`.

    Raises:
        UserError: there is no such module, file or name, or the import raises.
    """
    # split the path into module, or file, and name
    file, colon, name = path.rpartition(":")
    if not colon:
        file, _, name = path.rpartition(".")
    if not file or not name:
        raise UserError(
            f"reward {path!r} must be an import path such as `my_module.f`, or `file.py:name`"
        )
    # import the module
    try:
        module = (
            _module_of_file(Path(file).expanduser())
            if file.endswith(".py")
            else importlib.import_module(file)
        )
    except UserError:
        raise
    except BaseException as error:
        if isinstance(error, ModuleNotFoundError) and f"{file}.".startswith(f"{error.name}."):
            raise UserError(
                f"no module `{error.name}` for `{path}`; looked in {Path.cwd()} and among the "
                "packages"
            ) from error
        raise UserError(f"reward {path!r} cannot be imported: {describe(error)}") from error
    # take the name
    if not hasattr(module, name):
        raise _no_name(path, file, name, module)
    return getattr(module, name)


def _no_name(path: str, file: str, name: str, module: ModuleType) -> UserError:
    """Return the error for a name that a module lacks, with the names that it has."""
    close = difflib.get_close_matches(name, list(vars(module)), n=1)
    if close and ":" not in path:
        place = f"`{file}` ({getattr(module, '__file__', None)})"
        return UserError(f"no `{name}` in {place}; did you mean `{close[0]}`?")
    functions = ", ".join(
        known
        for known, value in vars(module).items()
        if callable(value) and not known.startswith("_")
    )
    return UserError(
        f"reward {path!r}: {file} has no `{name}`; it has {functions[:200] or 'no functions'}"
    )


def _module_of_file(file: Path) -> ModuleType:
    """Return the module of a Python file, which is run once."""
    # a configuration is parsed in its own folder; the file may be relative to another entry
    if not file.is_file():
        candidates = (Path(entry) / file for entry in sys.path)
        file = next((candidate for candidate in candidates if candidate.is_file()), file)
    if not file.is_file():
        raise UserError(f"there is no file {str(file)!r} with rewards (seen from {Path.cwd()})")
    # a file that is already imported
    name = f"reward_file_{file.resolve().with_suffix('').as_posix().strip('/').replace('/', '_')}"
    if name in sys.modules:
        return sys.modules[name]
    # import it under a name of its own
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"reward file {str(file)!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
