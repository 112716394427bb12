"""What is read from users' objects: the parameters of an optimizer, and what functions and classes refer to."""

import concurrent.futures
import dis
import functools
import itertools
import queue
import sys
import threading
import types
import weakref
from collections import ChainMap, UserDict, UserList
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cache, lru_cache
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset
from transformers import PretrainedConfig

from .kinds import Attributes


class Optimized:
    """The parameters of `owner.optimizer`: the same object until the optimizer or its parameters change."""

    def __init__(self, owner: Any):
        self.owner = owner
        self._of: tuple[weakref.ref, list[int]] | None = None
        self._parameters: Collection[Tensor] = ()

    def __call__(self) -> Collection[Tensor] | None:
        """The parameters in the groups, or `None` without an optimizer; cached as long as the groups are the same."""
        if self.owner.optimizer is None:
            return None
        groups = self.owner.optimizer.param_groups
        every = [*itertools.chain.from_iterable(group["params"] for group in groups)]
        of = (weakref.ref(self.owner.optimizer), [*map(id, every)])
        if self._of != of:
            self._of, self._parameters = of, dict.fromkeys(every).keys()
        return self._parameters


# Attributes of these packages' objects are not copied: users keep no state in them.
_LIBRARIES = {
    *sys.stdlib_module_names,
    *("accelerate", "datasets", "deepspeed", "evaluate", "hf_lsam", "hf_lsam_recipes", "huggingface_hub"),
    *("matplotlib", "numpy", "pandas", "PIL", "pyarrow", "scipy", "sklearn", "tokenizers", "torch", "tqdm"),
    *("transformers", "wandb"),
}
# An object with one of these in it is also used by other threads, so it is not restored.
_LOCKS = (threading.Condition, threading.Event, type(threading.Lock()), type(threading.RLock()))
_THREADS = (*_LOCKS, threading.Thread, queue.Queue, concurrent.futures.Executor)
# The operations of a function that use its global variables.
_OF_GLOBALS = {"LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL"}
# Objects of the standard library whose attributes are copied: users keep state in them.
_OPENED = (Optimizer, LRScheduler, PretrainedConfig, types.SimpleNamespace, threading.local)
# Those that keep their items in an attribute.
_WITH_DATA = (UserDict, UserList, weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet)


@cache
def is_users(module: str | None) -> bool:
    """Whether a module is neither of a library nor installed, so that its classes and variables may hold state."""
    file = getattr(sys.modules.get(module or ""), "__file__", None) or ""
    return (module or "").partition(".")[0] not in _LIBRARIES and "-packages" not in file


def is_opened(kind: type) -> bool:
    """Whether the attributes of objects of a class are copied, as those of all users' classes are."""
    if issubclass(kind, _OPENED):
        return True
    return kind.__module__.partition(".")[0] not in _LIBRARIES and not issubclass(kind, (types.ModuleType, Dataset))


def is_used_by_threads(attributes: dict[str, Any]) -> bool:
    """Whether one of the attributes of an object shows that other threads use it."""
    return any(isinstance(value, _THREADS) for value in attributes.values())


def is_users_function(thing: Any) -> bool:
    """Whether `thing` is a function of a user's module."""
    return isinstance(thing, types.FunctionType) and is_users(thing.__globals__.get("__name__"))


def is_users_callable(thing: Any) -> bool:
    """Whether `thing` is a function, a method, or another callable object of a user's module."""
    return is_users(getattr(thing.func if isinstance(thing, functools.partial) else thing, "__module__", None))


# What an object of these classes refers to: functions, methods, and other wrappers.
_PARTS: dict[type, Callable[[Any], Iterable[Any]]] = {
    types.FunctionType: lambda f: (*(f.__closure__ or ()), *(f.__defaults__ or ()), vars(f)),
    types.MethodType: lambda method: (method.__self__, method.__func__),
    staticmethod: lambda method: (method.__func__,),
    classmethod: lambda method: (method.__func__,),
    property: lambda it: (it.fget, it.fset),
    types.CellType: lambda cell: (cell.cell_contents,) if cell != types.CellType() else (),
    functools.partial: lambda it: (it.func, *it.args, *it.keywords.values()),
    functools._lru_cache_wrapper: lambda it: (it.__wrapped__,),
    weakref.ref: lambda reference: (reference(),),
    ChainMap: lambda it: it.maps,
    **dict.fromkeys(_WITH_DATA, lambda it: (it.data,)),
}


def parts_of(kind: type) -> Callable[[Any], Iterable[Any]] | None:
    """A function that returns what an object of a class refers to; `None` for all others than wrappers."""
    return next((_PARTS[base] for base in kind.__mro__ if base in _PARTS), None)


@lru_cache(1024)
def users_among(classes: tuple[type, ...]) -> tuple[type, ...]:
    """Those of the classes that are not of a library."""
    return tuple(each for each in classes if is_users(each.__module__))


class _Variables:
    """An object whose attributes are the variables of a module."""

    def __init__(self, variables: dict[str, Any]):
        self.__dict__ = variables


def variables_of(function: types.FunctionType) -> Iterator[Attributes]:
    """The variables that a function uses: of its own module, and of users' modules, as in `settings.step += 1`."""
    names = _names_in(function.__code__)
    yield Attributes(_Variables(function.__globals__), names.variables)
    modules, seen = [*map(function.__globals__.get, names.variables), *map(sys.modules.get, names.imported)], set()
    for module in modules:
        if isinstance(module, types.ModuleType) and is_users(module.__name__) and module not in seen:
            seen.add(module)
            modules += map(vars(module).get, names.every)  # modules of a package
            yield Attributes(_Variables(vars(module)), names.every)


class _Names(NamedTuple):
    """The names in the code of a function."""

    variables: tuple[str, ...]  # its global variables
    imported: tuple[str, ...]  # the modules that it imports itself
    every: tuple[str, ...]  # these, and all attributes


@lru_cache(1024)
def _names_in(code: types.CodeType) -> _Names:
    read = [*dis.get_instructions(code)]
    variables = [each.argval for each in read if each.opname in _OF_GLOBALS]
    imported = [each.argval for each in read if each.opname == "IMPORT_NAME"]
    inner = [_names_in(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    parts = zip((variables, imported, code.co_names), *inner, strict=True)
    return _Names(*(tuple(dict.fromkeys(itertools.chain(*part))) for part in parts))
