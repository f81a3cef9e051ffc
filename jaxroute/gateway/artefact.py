"""The folder of an exported router: its manifest, its checks, and the compiled decision."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import Float

from jaxroute.env.types import Batch, Others, Recent
from jaxroute.errors import UserError
from jaxroute.serving import CloudConfig, ExpertConfig, Site, SiteConfig, build_site
from jaxroute.workloads.limits import Limits

FORMAT, FORMAT_VERSION = "jaxroute-router", 4
MANIFEST, DECIDE, PREDICTOR = "manifest.json", "decide.jax_export", "predictor"

# Infinite where a request has no such limit.
LIMIT_FIELDS = tuple(f"{name}_limit" for name in Limits._fields)
CLOUD_FIELDS = ("to_cloud", "cloud_predicted_quality", "cloud_predicted_output_tokens")
OTHERS_FIELDS = tuple(f"others_{name}" for name in Others._fields)
# What a limit allows per second, 0 where there is none.
TYPICAL_LIMIT_FIELDS = tuple(f"typical_{name}_per_second" for name in Limits._fields)

# The arguments of the exported function: four float32 arrays, with the fields along the first axis.
FIELDS: dict[str, tuple[str, ...]] = {
    "site": (*Site._fields, "log_length_error"),  # (field, expert)
    # (field, slot, expert); masks are 0 or 1. What only groups have comes of the function itself.
    "batch": (*(name for name in Batch._fields if name not in {"limits", *Batch._field_defaults}), *LIMIT_FIELDS),
    # (field, expert); others are the requests there that came past the router, and are taken to be typical.
    "experts": (
        *("recent_latency", "up", "predicted_quality", "predicted_output_tokens"),
        *OTHERS_FIELDS,
        *("typical_quality", "typical_output_tokens"),
    ),
    "arrival": (
        "prompt_tokens",
        *LIMIT_FIELDS,
        "age",
        *Recent._fields,
        "accelerator_price",
        "cloud_price",
        *CLOUD_FIELDS,
        "gauge_age",
        "typical_prompt_tokens",
        *TYPICAL_LIMIT_FIELDS,
    ),  # (field,); to_cloud is 0 or 1, and all three of a cloud are 0 where there is none
}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check the manifest and the files that it names.

    Raises:
        UserError: it is not there, not ours, of another version, or a file differs.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}); name a folder that python -m jaxroute export wrote"
        ) from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path} is not an exported router's; name a folder that python -m jaxroute export wrote")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{folder} is an exported router of format {version}, and this jaxroute reads format {FORMAT_VERSION}; "
            "export it again with this version"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or DECIDE not in files:
        raise UserError(f"{path} is damaged (it names no {DECIDE}); export the router again")
    for name, digest in files.items():
        if not (folder / name).is_file() or file_digest(folder / name) != digest:
            raise UserError(f"{folder / name} is missing or damaged; export the router again")
    return manifest


def site_config(manifest: dict[str, Any]) -> SiteConfig:
    """Return the site of a manifest."""
    of_site = manifest["site"]
    experts = [ExpertConfig(**expert) for expert in of_site["experts"]]
    return SiteConfig(of_site["name"], experts, CloudConfig(**of_site["cloud"]) if of_site["cloud"] else None)


def site_values(manifest: dict[str, Any]) -> Float[np.ndarray, "field expert"]:
    """Return the first argument of the decision, as in `FIELDS`, of a manifest's site."""
    return site_array(site_config(manifest), [float(error) for error in manifest["log_length_error"]])


def site_array(config: SiteConfig, log_length_error: Sequence[float]) -> Float[np.ndarray, "field expert"]:
    """Return the first argument of the decision, as in `FIELDS`."""
    table = build_site(config)
    rows = [getattr(table, name) for name in FIELDS["site"][:-1]] + [log_length_error]
    return np.stack([np.asarray(row, np.float32) for row in rows])


def decision_shapes(num_experts: int, slots: int) -> list[jax.ShapeDtypeStruct]:
    """Return the shapes of a decision's arguments, that of the site first."""
    behind = {"batch": (slots, num_experts), "arrival": ()}
    return [
        jax.ShapeDtypeStruct((len(fields), *behind.get(name, (num_experts,))), np.float32)
        for name, fields in FIELDS.items()
    ]


def file_digest(path: Path) -> str:
    """Return a file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def compile_decision(
    folder: Path, site: Float[np.ndarray, "field expert"], slots: int, platform: str, written_by: str
) -> Callable[..., Any]:
    """Return the exported function, with the site filled in, compiled for one device of the platform."""
    check_flatbuffers()
    serialised = (folder / DECIDE).read_bytes()
    try:
        exported = jax.export.deserialize(bytearray(serialised))
    except Exception as error:  # It raises many kinds. For the user, all mean that the versions do not fit.
        raise UserError(
            f"{folder} was exported by {written_by}, which jax {jax.__version__} cannot read "
            f"({type(error).__name__}); export it again with a jax of about the same age"
        ) from error
    shapes = [argument.shape for argument in decision_shapes(site.shape[1], slots)]
    if [aval.shape for aval in exported.in_avals] != shapes:
        raise UserError(f"{folder / MANIFEST} is damaged (it is of another site); export the router again")
    if platform not in exported.platforms:
        raise UserError(f"platform={platform} is unknown; choose {' or '.join(exported.platforms)}")
    try:
        device = jax.devices(platform)[0]
    except RuntimeError:
        raise UserError(f"platform={platform}: jax finds no such device here; use platform=cpu") from None
    executable = _executable(serialised, device)
    of_site = jax.device_put(site, device)
    return lambda *rest: executable(of_site, *rest)


@cache
def _executable(serialised: bytes, device: jax.Device) -> Callable[..., Any]:
    """Compile once per process, however many routers are loaded from one export."""
    exported = jax.export.deserialize(bytearray(serialised))
    place = SingleDeviceSharding(device)
    arguments = [jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=place) for aval in exported.in_avals]
    return jax.jit(exported.call).lower(*arguments).compile()


def check_flatbuffers() -> None:
    """Check that jax can write and read exports.

    Raises:
        UserError: it lacks a package for that.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise UserError("exported routers need the package flatbuffers; run pip install 'jaxroute[export]'")


def load_predictor(folder: Path, columns: Sequence[str]) -> Callable[[str], tuple[np.ndarray, np.ndarray]]:
    """Return the function that predicts quality and length at each expert from a prompt's text."""
    predictor = predictor_class().load(folder / PREDICTOR)
    chosen = [list(predictor.models).index(column) for column in columns]

    def predict(prompt: str) -> tuple[np.ndarray, np.ndarray]:
        quality, length = predictor([prompt])
        return np.asarray(quality)[0, chosen], np.asarray(length)[0, chosen]

    return predict


def predictor_class() -> Any:
    """Return `jaxroute.predictors.Predictor`; imported here because few routers need it."""
    from jaxroute.predictors import Predictor

    return Predictor
