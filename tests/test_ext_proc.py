"""The endpoint picker, asked as Envoy asks: a gRPC client that carries requests and answers by the picker's word."""

from __future__ import annotations

import asyncio
import importlib
import json
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import yaml
from aiohttp import web
from serving import MODELS, OddServer, begin_stream, chat, emulated, fleet_options, write_fleet

from jaxroute.commands.fleets import load_fleet
from jaxroute.commands.picker import main
from jaxroute.decisions import read_decisions

for package in ("envoy_data_plane", "grpc"):
    pytest.importorskip(package, reason=f"{package} is not installed; it comes with jaxroute[ext-proc]")
import grpc  # noqa: E402
from envoy import Envoy, Mode  # noqa: E402

from jaxroute.adapters.ext_proc import (  # noqa: E402
    DESTINATION,
    EndpointPicker,
    HealthCheckRequest,
    HealthCheckResponse,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def servers(loop, site):
    fleet = emulated(site, lengths=6)
    loop.run(fleet.start())
    yield fleet
    loop.run(fleet.stop())


@asynccontextmanager
async def picking(folder, urls, **options):
    """A picker, and a channel to it."""
    path = write_fleet(folder / "fleet.yaml", fleet_options(urls, MODELS, speed=20.0, **options))
    picker = EndpointPicker(*await asyncio.to_thread(load_fleet, path), folder)
    port = await picker.start("127.0.0.1", 0)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield picker, channel
    finally:
        await picker.stop()


async def records(picker, folder):
    """What the log says once all has ended."""
    while picker.exchanges:
        await asyncio.sleep(0.005)
    await asyncio.to_thread(picker.recorder.flush)
    loads = picker.policies.router.loads
    assert not loads.running.any()
    assert not loads.waiting.any()
    return read_decisions(folder / "decisions.jsonl").records


@pytest.mark.parametrize("duplex", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_a_request_goes_where_the_picker_says_and_is_learned_from(loop, servers, tmp_path, duplex, stream):
    async def run():
        async with picking(tmp_path, servers.urls, policy="quality_only") as (picker, channel):
            envoy = Envoy(channel, duplex)
            assert await envoy.ask(json.dumps(chat(stream=stream, max_tokens=5)).encode())
            status, got = await envoy.carry()
            return envoy, status, got, await records(picker, tmp_path)

    envoy, status, got, (record,) = loop.run(run())
    assert status == 200
    assert f"http://{envoy.headers[DESTINATION]}/v1" == servers.urls[2]
    assert envoy.headers["x-jaxroute-expert"] == MODELS[2]
    sent = json.loads(envoy.body)
    assert sent["model"] == MODELS[2]
    if stream:
        assert sent["stream_options"] == {"include_usage": True}
        assert got.endswith(b"data: [DONE]\n\n")
        assert b"completion_tokens" not in got
    else:
        assert len(json.loads(got)["choices"][0]["message"]["content"].split()) == 5
    assert (record["outcome"], record["output_tokens"], record["tokens_from"]) == ("completed", 5, "usage")
    assert (record["ttft"] is not None) == stream


@pytest.mark.parametrize("duplex", [True, False])
def test_a_declined_request_gets_429_at_once(loop, servers, tmp_path, duplex):
    async def run():
        hurried = {"hurried": {"ttft": 1e-6}, "kept": {"ttft": 1e-6, "decline": False}}
        more = {"policy": "impact_greedy+decline", "classes": hurried}
        async with picking(tmp_path, servers.urls, **more) as (picker, channel):
            first, second = Envoy(channel, duplex), Envoy(channel, duplex)
            assert not await first.ask(json.dumps(chat()).encode())
            assert await second.ask(json.dumps(chat()).encode(), headers={"x-jaxroute-class": "kept"})
            await second.carry()
            return first.immediate, await records(picker, tmp_path)

    immediate, found = loop.run(run())
    headers = {one.header.key: one.header.raw_value for one in immediate.headers.set_headers}
    assert immediate.status.code == 429
    assert headers == {"content-type": b"application/json", "retry-after": b"1"}
    assert json.loads(immediate.body)["error"]["code"] == "declined"
    assert [record["outcome"] for record in found] == ["declined", "completed"]


def test_only_what_envoy_offers_is_picked(loop, servers, tmp_path):
    async def run():
        offered = [url.removeprefix("http://").removesuffix("/v1") for url in servers.urls]
        async with picking(tmp_path, servers.urls, policy="quality_only") as (picker, channel):
            picked = []
            for subset in (offered[:2], [*offered[:1], "10.9.8.7:8000"], ["10.9.8.7:8000"], []):
                envoy = Envoy(channel, duplex=True)
                await envoy.ask(json.dumps(chat()).encode(), subset=subset)
                picked.append(envoy.immediate.status.code if envoy.immediate else envoy.headers[DESTINATION])
                envoy.leave()
            named = Envoy(channel, duplex=True)
            await named.ask(json.dumps(chat() | {"model": MODELS[0]}).encode())
            named.leave()
            await records(picker, tmp_path)
            return offered, picked, named.headers[DESTINATION]

    offered, picked, named = loop.run(run())
    assert picked == [offered[1], offered[0], 503, 503]
    assert named == offered[0]


def test_what_cannot_be_routed(loop, servers, tmp_path):
    async def run():
        async with picking(tmp_path, servers.urls, limits={"body_bytes": 500}) as (picker, channel):
            models, embeddings = Envoy(channel, duplex=True), Envoy(channel, duplex=True)
            assert await models.ask(None, path="/v1/models")
            assert await embeddings.ask(b'{"input": "x", "and": "more"}', path="/v1/embeddings")
            assert embeddings.body == b'{"input": "x", "and": "more"}'
            refused = []
            for body in (b'{"model": "auto", "messages": 3}', b"nothing of the kind", b" " * 501):
                envoy = Envoy(channel, duplex=True)
                assert not await envoy.ask(body)
                refused.append((envoy.immediate.status.code, json.loads(envoy.immediate.body)["error"]["code"]))
            assert not picker.exchanges
            return models.headers[DESTINATION], refused

    anywhere, refused = loop.run(run())
    assert f"http://{anywhere}/v1" in servers.urls
    assert refused == [(400, "invalid_request"), (400, "invalid_json"), (413, "body_too_large")]


def test_a_client_that_leaves_frees_its_seat(loop, servers, tmp_path):
    async def run():
        async with picking(tmp_path, servers.urls) as (picker, channel):
            envoy = Envoy(channel, duplex=True)
            assert await envoy.ask(json.dumps(chat(stream=True)).encode())
            _, got = await envoy.carry(parts=1)
            envoy.leave()
            return got, await records(picker, tmp_path)

    got, (record,) = loop.run(run())
    assert got
    assert record["outcome"] == "cancelled"


@pytest.mark.parametrize("way", ["broken", "cut"])
def test_a_server_that_fails_goes_down(loop, servers, tmp_path, way):
    async def fail(request):
        if way == "broken":
            return web.json_response({"error": {"message": "broken"}}, status=500)
        response = await begin_stream(request)
        await response.write(b'data: {"choices": [{"delta": {"content": "one"}}]}\n\n')
        return response

    async def run():
        async with OddServer(fail) as odd:
            # It says that it is well, so that only requests speak against it.
            more = {"policy": "quality_only", "health": {"interval_s": 60, "failures": 2}}
            async with picking(tmp_path, [*servers.urls[:2], odd.url], **more) as (picker, channel):
                for _ in range(3):
                    envoy = Envoy(channel, duplex=True)
                    assert await envoy.ask(json.dumps(chat(stream=True)).encode())
                    await envoy.carry()
                return await records(picker, tmp_path), list(picker.health.up)

    found, up = loop.run(run())
    assert up == [True, True, False]
    assert [(record["expert"], record["outcome"]) for record in found] == [
        *[(MODELS[2], "failed")] * 2,
        (MODELS[1], "completed"),
    ]


def test_grpc_health(loop, servers, tmp_path):
    async def run():
        async with picking(tmp_path, servers.urls, health={"interval_s": 60}) as (picker, channel):
            check = channel.unary_unary("/grpc.health.v1.Health/Check", bytes, HealthCheckResponse.FromString)
            asked = ["", "liveness", "readiness", "envoy.service.ext_proc.v3.ExternalProcessor"]
            before = [(await check(HealthCheckRequest(service=one))).status for one in asked]
            picker.health.up[:] = [False] * 3
            after = [(await check(HealthCheckRequest(service=one))).status for one in asked]
            with pytest.raises(grpc.aio.AioRpcError, match="there is no service 'x'"):
                await check(HealthCheckRequest(service="x"))
            return before, after

    assert loop.run(run()) == ([1, 1, 1, 1], [1, 1, 2, 2])


@pytest.mark.parametrize(
    ("options", "words", "message"),
    [
        ({}, ["--listen", "0.0.0.0:9002"], "can be reached from other machines, and asks for no key"),
        ({}, ["--listen", "here"], "--listen=here must be an address and a port"),
        ({}, ["--key", "x.pem"], "--certificate and --key belong together"),
        ({"keys": ["0" * 64]}, [], "keys is given, and Envoy carries the requests"),
        ({"path": "/api"}, [], "Envoy sends requests to /v1; it must end so"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, capsys, options, words, message):
    path = options.pop("path", "/v1")
    urls = [f"http://127.0.0.1:{9100 + e}{path}" for e in range(3)]
    fleet = write_fleet(tmp_path / "fleet.yaml", fleet_options(urls, MODELS, **options))
    assert main([str(fleet), *words]) == 2
    error = capsys.readouterr().err
    assert message in error.replace("\n", " ")


def test_the_documented_configuration_is_envoys():
    # Any field that Envoy's own messages do not have is an error. What is inside an Any is read by its type.
    for name in (
        "extensions.filters.network.http_connection_manager.v3",
        "extensions.filters.http.router.v3",
        "extensions.upstreams.http.v3",
    ):
        importlib.import_module(f"envoy_data_plane.envoy.{name}")
    bootstrap = importlib.import_module("envoy_data_plane.envoy.config.bootstrap.v3").Bootstrap
    text = (Path(__file__).parents[1] / "docs" / "examples" / "envoy.yaml").read_text()
    resources = bootstrap.from_dict(yaml.safe_load(text)).static_resources
    manager = resources.listeners[0].filter_chains[0].filters[0].typed_config.unpack()
    modes = manager.http_filters[0].typed_config.unpack().processing_mode
    assert modes.request_body_mode == modes.response_body_mode == Mode.FULL_DUPLEX_STREAMED
    assert resources.clusters[0].original_dst_lb_config.http_header_name == DESTINATION


def test_the_documented_fleet_of_kubernetes_is_sound(tmp_path):
    text = (Path(__file__).parents[1] / "docs" / "examples" / "kubernetes.yaml").read_text()
    config, picker, *_ = yaml.safe_load_all(text)
    for name, content in config["data"].items():
        (tmp_path / name).write_text(content.replace("/etc/jaxroute/", ""))
    fleet, _ = load_fleet(tmp_path / "fleet.yaml")
    assert len(fleet.experts) == 2
    (container,) = picker["spec"]["template"]["spec"]["containers"]
    assert container["command"][1:4] == ["-m", "jaxroute", "picker"]
