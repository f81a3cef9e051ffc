"""A trained router for any gateway.

python -m jaxroute export RUN --out FOLDER [--predictor FOLDER] [option=value ...]

The folder holds a manifest and the decision: one StableHLO program, parameters included, from what a gateway knows to
the chosen expert. `jaxroute.gateway.Router` reads it; docs/how-to/export.md describes both.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxroute import __version__
from jaxroute.config import Config, load_config, read_config
from jaxroute.env import EnvParams
from jaxroute.env.environment import best_net
from jaxroute.env.types import CloudParams
from jaxroute.errors import UserError
from jaxroute.files import check_new, complete_folder
from jaxroute.gateway.artefact import (
    DECIDE,
    FIELDS,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    PREDICTOR,
    check_flatbuffers,
    decision_shapes,
    file_digest,
    predictor_class,
    site_values,
)
from jaxroute.gateway.observed import observation
from jaxroute.gateway.router import Router
from jaxroute.runs import CONFIG_FILE, TrainedPolicy, load_policy, run_of
from jaxroute.scenarios import build_env
from jaxroute.serving import SiteConfig

PLATFORMS = ("cpu", "cuda")

# The groups of options that an export can change.
_OPTIONS = ("site", "bank", "workload", "data_dir")


def export_router(
    run: Path, folder: Path, *, predictor: Path | None = None, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Write the router of a run, its latest checkpoint, into a new folder, which appears complete or not at all.

    It may send requests away if it was trained to (`env.away`).

    Args:
        run: a run directory or one of its checkpoints.
        folder: must not exist yet.
        predictor: folder of a `jaxroute.predictors.Predictor`, to be copied; its errors replace the bank's.
        overrides: options of site, bank and workload other than the run's, as on the command line.

    Returns:
        The manifest.

    Raises:
        UserError: the folder exists or cannot be written; the run has no checkpoint that fits the site; the predictor
            lacks an LLM.
    """
    check_new(folder, "--out")
    check_flatbuffers()
    for option in overrides:
        if option.split("=")[0].split(".")[0] not in _OPTIONS:
            raise UserError(f"{option} does not change an export; options are those of {', '.join(_OPTIONS)}")
    of_run = _config_of(run)
    manifest, policy, cloud = _described(run, predictor, of_run, load_config(overrides, of_run))
    _write(folder, manifest, _exported(policy, manifest, cloud), predictor)
    return manifest


def router_of(run: Path, *, site: SiteConfig | None = None, rate: float | None = None) -> tuple[Router, dict[str, Any]]:
    """Return a run's router as a gateway uses it, compiled in this process instead of exported; and its manifest.

    Args:
        run: a run directory, one of its checkpoints, or `pretrained/<name>`.
        site: other than the run's; the run's bank must know its LLMs.
        rate: requests per second to expect at first.

    Raises:
        UserError: as `export_router`.
    """
    of_run = _config_of(run)
    config = of_run if site is None else dataclasses.replace(of_run, site=site)
    manifest, policy, cloud = _described(run, None, of_run, config)
    of_site = site_values(manifest)
    program = jax.jit(decision(policy, manifest["away"], cloud)).lower(*_shapes(manifest)).compile()
    return Router.described(manifest, lambda *seen: program(of_site, *seen), rate=rate), manifest


def _config_of(run: Path) -> Config:
    config = read_config(run_of(run, "run") / CONFIG_FILE)
    if config.site.prefix_caching and config.env.see_prefixes:
        raise UserError(
            f"{run} was trained to see what each expert has cached, which a gateway does not tell it yet; "
            "train a router with env.see_prefixes=false, or choose another"
        )
    return config


def _described(
    run: Path, predictor: Path | None, of_run: Config, config: Config
) -> tuple[dict[str, Any], TrainedPolicy, CloudParams | None]:
    """Return the manifest of a run's router for a configuration, the router, and the cloud of its site."""
    env, params = build_env(config)
    policy = load_policy(run, env, params)
    log_length_error, columns = _errors_of(predictor, config, params)
    cloud = params.cloud
    of_cloud = None
    if cloud is not None:
        log_length_error, of_cloud = log_length_error[:-1], log_length_error[-1]
        cloud = cloud._replace(log_length_error=jnp.float32(of_cloud))
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "jaxroute": __version__,
        "jax": jax.__version__,
        "checkpoint": policy.label,
        "site": dataclasses.asdict(config.site),
        "log_length_error": log_length_error,
        "cloud_log_length_error": of_cloud,
        "away": env.away,
        "prices": {"accelerator": config.reward.accelerator_price, "cloud": 1.0},
        "slots": env.num_slots,
        "network": dataclasses.asdict(config.network),
        "rate": float(np.mean(params.rate)),
        "trained": _trained(of_run, build_env(of_run)[1] if config != of_run else params),
        "requirements": [dataclasses.asdict(requirement) for requirement in config.workload.requirements],
        "predictor": columns,
        "platforms": list(PLATFORMS),
        "arguments": {name: list(fields) for name, fields in FIELDS.items()},
    }
    return manifest, policy, cloud


def _trained(config: Config, params: EnvParams) -> dict[str, float]:
    """Return the greatest of what the router has met in training, beyond which a gateway may trust a rule instead.

    `load` is requests per second over the site's tokens per second with full batches.
    """
    capacity = float(np.sum(np.asarray(params.site.capacity)))
    return {
        "experts": len(config.site.experts),
        "load": config.train.loads[1] * float(np.mean(params.rate)) / capacity,
        "prompt_tokens": int(np.max(np.asarray(params.bank.prompt_tokens))),
        "output_tokens": float(np.max(np.asarray(params.bank.predicted_output_tokens))),
    }


def decision(
    policy: TrainedPolicy, away: bool, cloud: CloudParams | None
) -> Callable[..., tuple[Int[Array, ""], Float[Array, "action"], Float[Array, ""]]]:
    """Return the function that is exported: the trained router on arrays of `FIELDS`.

    Args:
        policy: the router.
        away: whether it may send requests away.
        cloud: where they go then; None declines them.
    """
    # As NumPy arrays, they become constants of the program.
    network, params, figures = policy.network, *(jax.tree.map(np.asarray, tree) for tree in (policy.params, cloud))

    def decide(
        site: Float[Array, "field expert"],
        batch: Float[Array, "field slot expert"],
        experts: Float[Array, "field expert"],
        arrival: Float[Array, "field"],
    ) -> tuple[Int[Array, ""], Float[Array, "action"], Float[Array, ""]]:
        """Return the action, the logits, and the best net value that an expert offers."""
        obs = observation(site, batch, experts, arrival, away=away, cloud=figures)
        logits, _ = network.apply(params, network.prepare(obs))
        return jnp.argmax(logits), logits, best_net(obs)

    return decide


def _shapes(manifest: dict[str, Any]) -> list[jax.ShapeDtypeStruct]:
    """Return the shapes of the decision's arguments."""
    return decision_shapes(len(manifest["site"]["experts"]), manifest["slots"])


def _exported(policy: TrainedPolicy, manifest: dict[str, Any], cloud: CloudParams | None) -> bytes:
    """Serialise the decision, for every platform."""
    # Without the paths of source files, which are private; and so the same router gives the same bytes everywhere.
    option = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, option)
    jax.config.update(option, 0)
    try:
        decide = jax.jit(decision(policy, manifest["away"], cloud))
        exported = jax.export.export(decide, platforms=PLATFORMS)(*_shapes(manifest))
        return bytes(exported.serialize())
    finally:
        jax.config.update(option, before)


def _errors_of(folder: Path | None, config: Config, params: EnvParams) -> tuple[list[float], list[str] | None]:
    """Return the log length error at each expert, and the predictor's name of its LLM if there is a predictor.

    If the site has a cloud, its own are the last.
    """
    if folder is None:
        errors = np.asarray(params.bank.log_length_error).tolist()
        return [*errors, float(params.cloud.log_length_error)] if params.cloud else errors, None
    predictor = predictor_class().load(folder)
    models = list(predictor.models)
    served = [*config.site.models, *([config.site.cloud.model] if params.cloud and config.site.cloud else [])]
    columns = [config.bank.models.get(model, model) for model in served]
    if missing := [column for column in columns if column not in models]:
        raise UserError(
            f"predictor {folder} does not know {missing[0]}, only {', '.join(models)}; "
            "say which one stands for it with bank.models"
        )
    errors = np.asarray(predictor.log_length_error, float)
    return [float(errors[models.index(column)]) for column in columns], columns


def _write(folder: Path, manifest: dict[str, Any], exported: bytes, predictor: Path | None) -> None:
    with complete_folder(folder) as draft:
        (draft / DECIDE).write_bytes(exported)
        if predictor is not None:
            shutil.copytree(predictor, draft / PREDICTOR)
        files = sorted(path for path in draft.rglob("*") if path.is_file())
        manifest["files"] = {path.relative_to(draft).as_posix(): file_digest(path) for path in files}
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
