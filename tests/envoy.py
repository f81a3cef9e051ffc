"""Envoy's part in external processing: a request is sent where the picker says, and its answer shown to it."""

from __future__ import annotations

import betterproto2
import grpc
from envoy_data_plane.envoy.config.core.v3 import HeaderMap, HeaderValue, Metadata
from envoy_data_plane.envoy.extensions.filters.http.ext_proc.v3 import ProcessingModeBodySendMode as Mode
from envoy_data_plane.envoy.service.ext_proc.v3 import (
    HttpBody,
    HttpHeaders,
    ProcessingRequest,
    ProcessingResponse,
    ProtocolConfiguration,
)
from envoy_data_plane.google.protobuf import ListValue, Struct, Value
from serving import WAIT, client

from jaxroute.adapters.ext_proc import DESTINATION


def headers_of(pairs, ends=False):
    listed = [HeaderValue(key=key, raw_value=value.encode()) for key, value in pairs.items()]
    return HttpHeaders(headers=HeaderMap(headers=listed), end_of_stream=ends)


class Envoy:
    """One request through Envoy, whose body modes are FULL_DUPLEX_STREAMED, or BUFFERED with answers STREAMED."""

    def __init__(self, channel, duplex):
        self.duplex = duplex
        self._stream = channel.stream_stream(
            "/envoy.service.ext_proc.v3.ExternalProcessor/Process",
            request_serializer=bytes,
            response_deserializer=ProcessingResponse.FromString,
        )(timeout=WAIT)
        self.headers, self.body, self.immediate = {}, b"", None

    async def _say(self, **part):
        await self._stream.write(ProcessingRequest(**part))

    async def _hear(self, kind):
        """The next response, which is of this kind unless it is immediate."""
        response = await self._stream.read()
        assert response is not grpc.aio.EOF
        found, part = betterproto2.which_one_of(response, "response")
        if found == "immediate_response":
            self.immediate = part
            return None
        assert found == kind
        mutation = part.response.header_mutation if part.response else None
        self.headers |= (
            {one.header.key: one.header.raw_value.decode() for one in mutation.set_headers} if mutation else {}
        )
        if response.dynamic_metadata is not None:
            named = response.dynamic_metadata.fields["envoy.lb"].struct_value.fields[DESTINATION].string_value
            assert named == self.headers[DESTINATION]
        return part.response

    async def ask(self, body, path="/v1/chat/completions", headers=None, subset=None):
        """Send a request's headers and body; returns whether it goes to a server."""
        duplex, hint = self.duplex, None
        modes = (Mode.FULL_DUPLEX_STREAMED,) * 2 if duplex else (Mode.BUFFERED, Mode.STREAMED)
        if subset is not None:
            listed = ListValue(values=[Value(string_value=one) for one in subset])
            fields = {"x-gateway-destination-endpoint-subset": Value(list_value=listed)}
            hint = Metadata(filter_metadata={"envoy.lb.subset_hint": Struct(fields=fields)})
        sent = {":path": path, ":method": "POST" if body is not None else "GET", **(headers or {})}
        await self._say(
            request_headers=headers_of(sent, ends=body is None),
            metadata_context=hint,
            protocol_config=ProtocolConfiguration(request_body_mode=modes[0], response_body_mode=modes[1]),
        )
        self.path = path
        if body is None or not duplex:
            await self._hear("request_headers")
        if body is None:
            return self.immediate is None
        for piece, last in ((body[:20], False), (body[20:], True)) if duplex else ((body, True),):
            await self._say(request_body=HttpBody(body=piece, end_of_stream=last))
        if duplex:
            if await self._hear("request_headers") is None:
                return False
            ended = False
            while not ended:
                streamed = (await self._hear("request_body")).body_mutation.streamed_response
                self.body += streamed.body
                ended = streamed.end_of_stream
        else:
            response = await self._hear("request_body")
            if response is None:
                return False
            self.body = response.body_mutation.body
        assert int(self.headers["content-length"]) == len(self.body)
        return True

    async def carry(self, parts=None):
        """Bring the request to its server, and the answer back: status and what the client gets, at most `parts`."""
        url = f"http://{self.headers[DESTINATION]}{self.path}"
        got = b""
        async with client() as session, session.post(url, data=self.body) as response:
            passed = {":status": str(response.status), "content-type": response.content_type}
            await self._say(response_headers=headers_of(passed))
            await self._hear("response_headers")
            chunks = [part async for part in response.content.iter_any()][:parts] if parts else None
            async for piece in _each(chunks) if parts else response.content.iter_any():
                got += await self._pass(piece, False)
            if parts is None:
                got += await self._pass(b"", True)
        return response.status, got

    async def _pass(self, piece, last):
        await self._say(response_body=HttpBody(body=piece, end_of_stream=last))
        if not self.duplex:
            mutation = (await self._hear("response_body")).body_mutation
            return piece if mutation is None else mutation.body or b""
        streamed = (await self._hear("response_body")).body_mutation.streamed_response
        assert streamed.end_of_stream == last
        return streamed.body

    def leave(self):
        self._stream.cancel()


async def _each(listed):
    for one in listed:
        yield one
