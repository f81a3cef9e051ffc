"""A trained router in a gateway: what it believes of the experts, and the artefact that holds its decision."""

from jaxroute.gateway.router import Router

__all__ = ["Router"]
