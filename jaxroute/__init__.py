"""jaxroute: LLM serving at the edge as pure JAX, and a graph policy that learns to route in it."""

from jaxroute.errors import UserError
from jaxroute.scenarios import SCENARIOS, make
from jaxroute.serving import Outcomes, Requests, Site, replay

__version__ = "0.1.0"

__all__ = ["SCENARIOS", "Outcomes", "Requests", "Site", "UserError", "__version__", "make", "replay"]
