"""Imports the model classes of diffusers and transformers without what those libraries bring along for other models.

Both import, for one UNet, all of their hundred models, and torch's compiler and tensor parallelism besides. Without
that, and without what `_skip_what_is_not_used` names, the first step comes after 2.3 s instead of 4.3 s (nano, all
cached, medians of 4 turns) and a picture after 3.2 s instead of 5.7 s. Here the packages that list all models stay
unread, and modules that nothing here runs are stood in for until somebody uses them. Afterwards no trace is left in
`sys.modules`: whoever asks for one of these modules gets the real one. If a library has been rearranged so that this
fails, it is imported in the ordinary way.

Only the command line does so, for its process is its own; a program that uses sdlora as a library imports as usual.
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

UNREAD = (
    *("diffusers.models.unets", "diffusers.models.autoencoders", "diffusers.models.transformers", "diffusers.hooks"),
    *("transformers.models", "transformers.models.auto"),
)
"""Packages whose `__init__` imports or lists every model; the modules in them are imported one by one."""

LATER = (
    *("torch._dynamo", "torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed._composable"),
    *("torch.distributed.checkpoint", "torch.distributed._functional_collectives", "peft"),
)
"""Modules that the libraries name when they are imported and use, if at all, much later."""

_WANTED = (
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.autoencoders.autoencoder_tiny",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
)
_LIBRARIES = ("diffusers", "transformers", "accelerate")


def import_models() -> bool:
    """Imports torch and the classes that every base consists of.

    Returns:
        Whether it was done the quick way; if not, the libraries are imported as usual where they are used.
    """
    if any(name in sys.modules for name in _LIBRARIES):
        return False
    with _no_collection():
        import torch  # noqa: F401 (before the finder, for torch names some of the modules when it is imported)

        before = set(sys.modules)
        try:
            with _standing_in():
                for name in _WANTED:
                    importlib.import_module(name)
        except Exception:  # whatever a version that was never seen may raise
            for name in set(sys.modules) - before:
                if name.partition(".")[0] in _LIBRARIES:
                    del sys.modules[name]
            return False
    _skip_what_is_not_used()
    return True


def _skip_what_is_not_used() -> None:
    """Keeps two libraries out of the first step that would be loaded only to find that there is nothing to do.

    Optimizers load torch's compiler, 0.5 s, to have it pass over their methods. A denoiser loads peft, 0.4 s, to set
    the strength of peft's adapters, and the command line has none: its adapters are sdlora's own.
    """
    import diffusers.utils
    from torch.optim import Optimizer

    for name in ("add_param_group", "state_dict", "load_state_dict"):
        plain = getattr(getattr(Optimizer, name), "__wrapped__", None)
        if plain is not None:
            plain.__dict__.setdefault("__dynamo_disable", plain)  # where torch keeps what it has found out
    diffusers.utils.USE_PEFT_BACKEND = False  # type: ignore[reportPrivateImportUsage]


@contextmanager
def _no_collection() -> Iterator[None]:
    """Pauses the garbage collector: an import makes a million objects, and none of them is garbage."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collecting:
            gc.enable()


@contextmanager
def _standing_in() -> Iterator[None]:
    finder = _Finder([name for name in LATER if name not in sys.modules])
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        finder.withdraw()


class _Finder(MetaPathFinder, Loader):
    """Finds stand-ins for the packages in `UNREAD`, not for what is in them, and for `later` with everything below."""

    def __init__(self, later: Sequence[str]) -> None:
        self.later = later
        self.made: list[_StandIn] = []

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if fullname in UNREAD:
            real = PathFinder.find_spec(fullname, path)
            if real is None:
                return None
            spec = ModuleSpec(fullname, self, origin=real.origin, is_package=True)
            spec.submodule_search_locations = real.submodule_search_locations
            return spec
        below = any(fullname == name or fullname.startswith(name + ".") for name in self.later)
        return ModuleSpec(fullname, self, is_package=True) if below else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = _StandIn(spec.name)
        self.made.append(module)
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass

    def withdraw(self) -> None:
        """Takes everything out of `sys.modules` again; what stands in for a name finds the real one from now on."""
        for module in self.made:
            if sys.modules.get(module.__name__) is module:
                del sys.modules[module.__name__]
            parent, _, name = module.__name__.rpartition(".")
            if parent in sys.modules and sys.modules[parent].__dict__.get(name) is module:
                delattr(sys.modules[parent], name)
            module.over = True


class _StandIn(ModuleType):
    """A module that has every name that it is asked for.

    Attributes:
        over: whether the import for which it stands in is over.
    """

    over = False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if self.over:
            return getattr(self.real(), name)
        if PathFinder.find_spec(f"{self.__name__}.{name}", self.__path__):
            return importlib.import_module(f"{self.__name__}.{name}")
        return _Name(name, (), {"module": self})

    def real(self) -> ModuleType:
        """Imports the module that this one stands in for."""
        return importlib.import_module(self.__name__)


class _Name(type):
    """Stands in for a class or function of a module: a call or an attribute imports it.

    During the import itself a function marks nothing when it is used as a decorator, and a class makes empty objects.
    """

    module: _StandIn

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls.module.over:
            return cls.real()(*args, **kwargs)
        if args and callable(args[0]):
            return args[0]
        if args and args[0] is None:  # a decorator's settings come first
            return lambda function: function
        if cls.__name__.lstrip("_")[:1].isupper():
            return object.__new__(cls)
        raise ImportError(f"{cls.module.__name__}.{cls.__name__} is wanted while libraries are imported")

    def __instancecheck__(cls, instance: Any) -> bool:
        # No object of a class can be there before its module is.
        return cls.module.over and cls.module.__name__ in sys.modules and isinstance(instance, cls.real())

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__") or not cls.module.over:
            raise AttributeError(name)
        return getattr(cls.real(), name)

    def real(cls) -> Any:
        """Imports what it stands in for."""
        return getattr(cls.module.real(), cls.__name__)
