"""A router of ours as LiteLLM's routing strategy: LiteLLM carries the requests, the policy of a fleet file chooses.

```python
from jaxroute.adapters.litellm import RoutingStrategy
from jaxroute.commands.fleets import load_fleet

strategy = RoutingStrategy(*load_fleet(Path("fleet.yaml")))
strategy.attach(router)  # a litellm.Router whose deployments are the servers of the fleet file
```

LiteLLM's proxy attaches it by itself if it is listed among its `callbacks`; docs/gateway.md has the files. What LiteLLM
does not tell, as when a client leaves, is taken from the life of a ticket that each request carries.
"""

from __future__ import annotations

import asyncio
import collections
import itertools
import uuid
import weakref
from collections.abc import AsyncGenerator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import litellm
from litellm.integrations.custom_logger import CustomLogger
from litellm.types.router import CustomRoutingStrategyBase

from jaxroute.decisions import CANCELLED, COMPLETED, DECLINED, FAILED, REJECTED
from jaxroute.errors import UserError
from jaxroute.gateway import router as places
from jaxroute.gateway.demand import RefusalError
from jaxroute.gateway.dispatch import Dispatcher
from jaxroute.gateway.exchange import Exchange, WallClock
from jaxroute.gateway.fleet import AUTO, Fleet
from jaxroute.gateway.log import Recorder
from jaxroute.gateway.metrics import Metrics
from jaxroute.gateway.policy import Policies

FROM_LITELLM = "litellm"
"""Tokens are those of LiteLLM's `usage`: what the server said, or what LiteLLM has counted."""

_TICKET = "jaxroute_ticket"
_PROVIDER = "jaxroute"
_NUMBERS = itertools.count()


class _Ticket(str):
    """A request's id, carried in its metadata; once nobody holds it any more, nothing more comes of the request."""

    refusal: RefusalError | None = None
    """Why it was turned away; LiteLLM may ask again."""


class RoutingStrategy(CustomLogger, CustomRoutingStrategyBase):
    """Chooses among the deployments of one `litellm.Router`, and learns from its callbacks. For one event loop."""

    dispatcher: Dispatcher
    """Books, log and metrics, as the gateway's."""

    def __init__(self, fleet: Fleet, policies: Policies, folder: Path = Path()) -> None:
        """Open the log.

        Args:
            fleet: servers, classes of service, log; what the gateway needs beyond these is not used.
            policies: what decides.
            folder: where the log's path starts.

        Raises:
            UserError: the log cannot be written.
        """
        super().__init__()
        # LiteLLM takes two of a class for one unless a public attribute differs.
        self.number = next(_NUMBERS)
        recorder = Recorder(fleet.log, folder, policies.assessor)
        self.dispatcher = Dispatcher(fleet, policies, recorder, Metrics(), WallClock(fleet.speed))
        self._router: Any = None
        self._places: dict[str, int] = {}
        """The place of each deployment, by its id."""
        self._sizes: collections.Counter[str] = collections.Counter()
        """How many of them each name stands for."""

    def attach(self, router: Any) -> None:
        """Choose for a `litellm.Router` from now on.

        Raises:
            UserError: a server of the fleet file is no deployment of it.
        """
        fleet = self.dispatcher.fleet
        urls = {expert.url.rstrip("/"): number for number, expert in enumerate(fleet.experts)}
        if fleet.cloud is not None:
            urls[fleet.cloud.url.rstrip("/")] = places.CLOUD
        found, sizes = {}, collections.Counter[str]()
        for deployment in router.model_list:
            url = str(deployment["litellm_params"].get("api_base")).rstrip("/")
            if url in urls:
                found[deployment["model_info"]["id"]] = urls[url]
                sizes[deployment["model_name"]] += 1
        for url, place in urls.items():
            if place not in found.values():
                raise UserError(f"{url} is in the fleet file and no deployment of LiteLLM; add it with this api_base")
        self._router, self._places, self._sizes = router, found, sizes
        router.set_custom_routing_strategy(self)
        litellm.logging_callback_manager.add_litellm_callback(self)

    def close(self) -> None:
        """Listen no more, and close the log."""
        litellm.logging_callback_manager.remove_callback_from_all_lists(self)
        self.dispatcher.recorder.close()
        self.dispatcher.policies.guard.close()

    # --- What LiteLLM asks -----------------------------------------------------------------------------------

    async def async_get_available_deployment(
        self,
        model: str,
        messages: list[dict[str, Any]] | None = None,
        input: Any = None,
        specific_deployment: bool | None = False,
        request_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Return the deployment that a request goes to.

        Raises:
            litellm.RateLimitError: the policy declines it, or too many are in flight.
            litellm.BadRequestError: one of its headers cannot be understood.
        """
        asked = {} if request_kwargs is None else request_kwargs
        given = {"messages": messages, "input": input, "specific_deployment": specific_deployment}
        by_place: dict[int, Any] = {}
        if messages is not None:  # embeddings, images and the like are none of ours
            healthy = await self._router.async_get_healthy_deployments(model=model, request_kwargs=asked, **given)
            deployments = [healthy] if isinstance(healthy, dict) else healthy
            ids = [one["model_info"]["id"] for one in deployments]
            by_place = {
                self._places[name]: one for name, one in zip(ids, deployments, strict=True) if name in self._places
            }
        experts = sorted(place for place in by_place if place >= 0)
        if not experts:
            usual = type(self._router).async_get_available_deployment
            return await usual(self._router, model=model, request_kwargs=asked, **given)
        # A name that stands for one server leaves no choice, and its requests are not declined.
        routed = len(deployments) > 1 or self._sizes[model] > 1
        wanted = AUTO if routed else self.dispatcher.fleet.experts[experts[0]].model
        body = {"model": wanted, "messages": messages, "stream": bool(asked.get("stream"))}
        metadata = _metadata(asked)
        try:
            exchange = self._admitted(metadata, body)
            if places.CLOUD not in by_place:
                exchange.demand.local_only = True
            return by_place[self._place(exchange, experts)]
        except RefusalError as refusal:
            metadata[_TICKET].refusal = refusal
            raise _as_litellm(refusal, model) from None

    def get_available_deployment(self, *given: Any, **more: Any) -> Any:
        """Refuse: threads would get into each other's way.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("jaxroute routes asynchronous calls only: use acompletion; LiteLLM's proxy does")

    def _admitted(self, metadata: dict[str, Any], body: dict[str, Any]) -> Exchange:
        """Take in a request, or find it if it comes again after a server has failed it.

        Raises:
            RefusalError: it cannot be understood, was refused before, or there are too many.
        """
        ticket = metadata.get(_TICKET)
        if isinstance(ticket, _Ticket):
            if ticket.refusal is not None:
                raise ticket.refusal
            if (known := self.dispatcher.exchanges.get(ticket)) is not None:
                if known.at_router:
                    self.dispatcher.try_failed(known, "asked again")
                known.outcome = known.ended = known.error = None
                return known
        dispatcher = self.dispatcher
        # The proxy puts the client's headers there.
        headers = {str(name).lower(): str(value) for name, value in (metadata.get("headers") or {}).items()}
        ticket = metadata[_TICKET] = _Ticket(f"req-{uuid.uuid4().hex}")
        try:
            demand = dispatcher.demand(body, headers, chat=True)
            exchange = dispatcher.admit(demand, str(ticket))
        except RefusalError as refusal:
            dispatcher.metrics.refused.labels(refusal.code).inc()
            raise
        loop = asyncio.get_running_loop()
        weakref.finalize(ticket, self._dropped, str(ticket), loop).atexit = False
        return exchange

    def _place(self, exchange: Exchange, experts: list[int]) -> int:
        """Let the policy choose, of those that have not failed the request if there are any.

        Raises:
            RefusalError: it declines the request.
        """
        dispatcher = self.dispatcher
        failed = {one["expert"] for one in exchange.tries}
        try:
            return dispatcher.route(exchange, [e for e in experts if dispatcher.name(e) not in failed] or experts)
        except RefusalError as refusal:
            exchange.end(DECLINED, dispatcher.clock.now(), status=refusal.status, error=str(refusal))
            dispatcher.leave(exchange)
            raise

    # --- What LiteLLM tells ----------------------------------------------------------------------------------

    async def async_pre_call_hook(
        self, user_api_key_dict: Any, cache: Any, data: dict[str, Any], call_type: Any
    ) -> None:
        """LiteLLM's proxy has a request: choose for its router, which may be a new one."""
        from litellm.proxy.proxy_server import llm_router

        if llm_router is not None and "async_get_available_deployment" not in vars(llm_router):
            self.attach(llm_router)

    async def async_pre_call_deployment_hook(self, kwargs: dict[str, Any], call_type: Any) -> None:
        """A request is about to be sent: see when its first token comes, for which there is no callback."""
        exchange, logging = self._exchange(kwargs), kwargs.get("litellm_logging_obj")
        if exchange is None or logging is None or not exchange.demand.stream:
            return
        note = logging.update_completion_start_time

        def first_token(*given: Any, **more: Any) -> None:
            if exchange.first_token is None and exchange.outcome is None:
                self.dispatcher.first_token(exchange)
            note(*given, **more)

        logging.update_completion_start_time = first_token

    async def async_post_call_failure_deployment_hook(
        self, request_data: Mapping[str, Any], exception: Exception, call_type: Any, fallback_depth: int | None = None
    ) -> None:
        """A server has failed a request; LiteLLM may ask again."""
        exchange = self._exchange(request_data)
        if exchange is not None and exchange.at_router:
            self.dispatcher.try_failed(exchange, type(exception).__name__)

    async def async_log_success_event(
        self, kwargs: dict[str, Any], response_obj: Any, start_time: Any, end_time: Any
    ) -> None:
        """An answer has ended."""
        exchange = self._exchange(kwargs["litellm_params"])
        if exchange is None:
            return
        dispatcher, usage = self.dispatcher, getattr(response_obj, "usage", None)
        exchange.end(COMPLETED, dispatcher.clock.now() - self._since(end_time), status=200)
        dispatcher.completed(
            exchange,
            tokens=getattr(usage, "completion_tokens", None) or None,
            tokens_from=FROM_LITELLM,
            prompt_tokens=getattr(usage, "prompt_tokens", None) or None,
        )
        dispatcher.leave(exchange)

    async def async_log_failure_event(
        self, kwargs: dict[str, Any], response_obj: Any, start_time: Any, end_time: Any
    ) -> None:
        """A try has failed, or an answer has broken off; a try may be the last one, or not."""
        exchange = self._exchange(kwargs["litellm_params"])
        if exchange is None:
            return
        error = kwargs.get("exception")
        status = int(getattr(error, "status_code", None) or 502)
        outcome = REJECTED if status == 429 else FAILED
        exchange.end(outcome, self.dispatcher.clock.now(), status=status, error=type(error).__name__)
        if exchange.first_token is not None:
            self.dispatcher.leave(exchange)

    async def async_post_call_streaming_iterator_hook(
        self, user_api_key_dict: Any, response: Any, request_data: dict[str, Any]
    ) -> AsyncGenerator[Any, None]:
        """Pass on a stream of LiteLLM's proxy, and see whether its client leaves."""
        whole = False
        try:
            async for part in response:
                yield part
            whole = True
        finally:
            exchange = self._exchange(request_data)
            if not whole and exchange is not None:
                self._over(exchange)

    def _exchange(self, holder: Mapping[str, Any]) -> Exchange | None:
        """Return the request that metadata tell of, if it has not ended."""
        for name in _METADATA:
            metadata = holder.get(name)
            if isinstance(metadata, dict) and _TICKET in metadata:
                return self.dispatcher.exchanges.get(str(metadata[_TICKET]))
        return None

    def _since(self, then: Any) -> float:
        """Return the time since LiteLLM's callback was due, s of the servers."""
        if not isinstance(then, datetime):
            return 0.0
        return max((datetime.now(then.tzinfo) - then).total_seconds(), 0.0) * self.dispatcher.clock.speed

    def _dropped(self, request_id: str, loop: asyncio.AbstractEventLoop) -> None:
        """Nobody holds a request's ticket any more; may be said in any thread."""
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._end_dropped, request_id)

    def _end_dropped(self, request_id: str) -> None:
        exchange = self.dispatcher.exchanges.get(request_id)
        if exchange is not None:
            self._over(exchange)

    def _over(self, exchange: Exchange) -> None:
        """Nothing more comes of a request: its last try has failed, or its client has left."""
        exchange.end(CANCELLED, self.dispatcher.clock.now(), status=499, error="the client has left")
        self.dispatcher.leave(exchange)


_METADATA = ("litellm_metadata", "metadata")
"""Where LiteLLM keeps what it knows of a request; the first only for some kinds."""


def _metadata(asked: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a request where a ticket may be kept."""
    for name in _METADATA:
        found = asked.get(name)
        if isinstance(found, dict):
            return found
    made: dict[str, Any] = {}
    asked["metadata"] = made
    return made


def _as_litellm(refusal: RefusalError, model: str) -> Exception:
    """Return a refusal as the error that LiteLLM gives its client; none is worth another try."""
    if refusal.status == 429:
        headers = {"retry-after": str(refusal.retry_after)}
        return litellm.RateLimitError(str(refusal), _PROVIDER, model, num_retries=0, headers=headers)
    return litellm.BadRequestError(str(refusal), model, _PROVIDER)
