"""A trained router in a gateway: the router, what it believes of the experts, and the artefact with its decision."""

from jaxroute.gateway.router import CLOUD, DECLINED, Router

__all__ = ["CLOUD", "DECLINED", "Router"]
