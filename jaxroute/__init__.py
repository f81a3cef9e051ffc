"""jaxroute: LLM serving at the edge as pure JAX, and a graph policy that learns to route in it.

The names below are loaded when they are first used, so that `import jaxroute` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from jaxroute.errors import UserError

if TYPE_CHECKING:
    from jaxroute.runs import load_router
    from jaxroute.scenarios import SCENARIOS, make
    from jaxroute.serving import Outcomes, Requests, Site, Texts, replay

__version__ = "0.1.0"

__all__ = [
    "SCENARIOS",
    "Outcomes",
    "Requests",
    "Site",
    "Texts",
    "UserError",
    "__version__",
    "load_router",
    "make",
    "replay",
]

_MODULES = {
    "SCENARIOS": "jaxroute.scenarios",
    "load_router": "jaxroute.runs",
    "make": "jaxroute.scenarios",
    "Outcomes": "jaxroute.serving",
    "Requests": "jaxroute.serving",
    "Texts": "jaxroute.serving",
    "Site": "jaxroute.serving",
    "replay": "jaxroute.serving",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
