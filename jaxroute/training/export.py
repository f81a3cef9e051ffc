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
from jaxroute.env import EdgeRouting, EnvParams
from jaxroute.env.cloud import expect_away
from jaxroute.env.environment import best_net, observe
from jaxroute.env.groups import group
from jaxroute.env.types import Batch, CloudParams, Described, Prices, Recent, Snapshot
from jaxroute.errors import UserError
from jaxroute.files import check_new, complete_folder
from jaxroute.gateway.artefact import (
    CLOUD_FIELDS,
    DECIDE,
    FIELDS,
    FORMAT,
    FORMAT_VERSION,
    LIMIT_FIELDS,
    MANIFEST,
    PREDICTOR,
    check_flatbuffers,
    file_digest,
    predictor_class,
)
from jaxroute.runs import CONFIG_FILE, TrainedPolicy, load_policy, run_of
from jaxroute.scenarios import build_env
from jaxroute.serving import Site
from jaxroute.workloads.limits import Limits

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
    config = load_config(overrides, read_config(run_of(run, "run") / CONFIG_FILE))
    env, params = build_env(config)
    policy = load_policy(run, env, params)
    log_length_error, columns = _errors_of(predictor, config, params)
    cloud = params.cloud
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
        "away": env.away,
        "prices": {"accelerator": config.reward.accelerator_price, "cloud": 1.0},
        "slots": env.num_slots,
        "network": dataclasses.asdict(config.network),
        "rate": float(np.mean(params.rate)),
        "requirements": [dataclasses.asdict(requirement) for requirement in config.workload.requirements],
        "predictor": columns,
        "platforms": list(PLATFORMS),
        "arguments": {name: list(fields) for name, fields in FIELDS.items()},
    }
    _write(folder, manifest, _exported(policy, env, cloud), predictor)
    return manifest


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
        of_site = dict(zip(FIELDS["site"], site, strict=True))
        log_error = of_site.pop("log_length_error")
        of_batch = dict(zip(FIELDS["batch"], batch, strict=True))
        requests = Batch(limits=Limits(*(of_batch.pop(name) for name in LIMIT_FIELDS)), **of_batch)
        recent_latency, up, predicted_quality, predicted_output_tokens = experts
        of_arrival = dict(zip(FIELDS["arrival"], arrival, strict=True))
        known = Snapshot(
            batch=group(Site(**of_site), requests._replace(running=requests.running > 0, waiting=requests.waiting > 0)),
            recent_latency=recent_latency,
            up=up > 0,
            age=jnp.float32(0.0),
        )
        request = Described(
            prompt_tokens=of_arrival["prompt_tokens"],
            limits=Limits(*(of_arrival[name] for name in LIMIT_FIELDS)),
            age=of_arrival["age"],
            predicted_quality=predicted_quality,
            predicted_output_tokens=predicted_output_tokens,
        )
        recent = Recent(*(of_arrival[name] for name in Recent._fields))
        prices = Prices(of_arrival["accelerator_price"], of_arrival["cloud_price"])
        obs = observe(Site(**of_site), log_error, known, request, recent, prices)
        if away:
            to_cloud, quality, tokens = (of_arrival[name] for name in CLOUD_FIELDS)
            obs = obs._replace(away=expect_away(figures, to_cloud > 0, request, quality, tokens, prices))
        logits, _ = network.apply(params, network.prepare(obs))
        return jnp.argmax(logits), logits, best_net(obs)

    return decide


def _exported(policy: TrainedPolicy, env: EdgeRouting, cloud: CloudParams | None) -> bytes:
    """Serialise the decision, for every platform."""
    shapes = {"site": (env.num_experts,), "batch": (env.num_slots, env.num_experts), "experts": (env.num_experts,)}
    arguments = [
        jax.ShapeDtypeStruct((len(fields), *shapes.get(name, ())), jnp.float32) for name, fields in FIELDS.items()
    ]
    # Without the paths of source files, which are private; and so the same router gives the same bytes everywhere.
    option = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, option)
    jax.config.update(option, 0)
    try:
        exported = jax.export.export(jax.jit(decision(policy, env.away, cloud)), platforms=PLATFORMS)(*arguments)
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
