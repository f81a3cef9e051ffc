"""From a fleet file to a policy that decides, and fleet files for emulated servers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from jaxroute.config import Config, load_config
from jaxroute.env import EnvParams
from jaxroute.errors import UserError, did_you_mean
from jaxroute.files import write_file
from jaxroute.gateway.artefact import MANIFEST, read_manifest, site_config
from jaxroute.gateway.fleet import Fleet, address_of, check_experts, read_fleet
from jaxroute.gateway.policy import Policies, guarded
from jaxroute.gateway.router import Router
from jaxroute.gateway.rules import Surroundings, is_rule, rule_named, rule_router, slots_of
from jaxroute.policies import RULES
from jaxroute.serving import CloudConfig, SiteConfig

EMULATED_POLICY = "impact_greedy+rate_price"
"""What decides in the fleet files of emulated servers, unless told otherwise."""

_USUAL_RATE = 1.0  # 1/s, until requests have come


def load_fleet(path: Path, listen: str | None = None) -> tuple[Fleet, Policies]:
    """Read a fleet file and build its policy; `listen` replaces the file's address.

    Raises:
        UserError: something is wrong with either.
    """
    fleet = read_fleet(path)
    if listen is not None:
        address_of("--listen", listen)
        fleet = dataclasses.replace(fleet, listen=listen)
    try:
        return fleet, _policies(path, fleet)
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(str(path)) else f"{path}: {text}") from None


def _policies(path: Path, fleet: Fleet) -> Policies:
    if is_rule(fleet.policy):
        return _of_rule(path, fleet)
    folder = path.parent / fleet.policy
    trained: dict[str, Any] | None
    if (folder / MANIFEST).is_file():
        if fleet.site is not None:
            raise UserError(f"site={fleet.site} is given, and an exported router brings its own; leave site out")
        manifest = read_manifest(folder)
        check_experts(path, fleet, [expert["model"] for expert in manifest["site"]["experts"]], f"policy {folder}")
        router = Router.load(folder, rate=fleet.rate)
    else:
        router, manifest = _of_run(path, fleet, folder)
    site = site_config(manifest)
    trained = manifest.get("trained")
    _check_cloud(fleet, site, bool(manifest["away"]))
    around = Surroundings(
        site=site,
        log_length_error=tuple(map(float, manifest["log_length_error"])),
        slots=int(manifest["slots"]),
        away=bool(manifest["away"]),
        cloud_log_length_error=float(manifest.get("cloud_log_length_error") or 0.5),
    )
    return guarded(fleet.policy, router, around, fleet, trained=trained)


def _of_rule(path: Path, fleet: Fleet) -> Policies:
    if fleet.site is None:
        raise UserError(
            f"site is missing: the rule {fleet.policy} needs the servers' speed; name a site of configs/site, such as "
            "edge6, or a file that python -m jaxroute calibrate wrote"
        )
    site = dataclasses.replace(site_named(path, fleet.site), cloud=None)
    check_experts(path, fleet, site.models, f"site {fleet.site}")
    cloud = fleet.cloud
    if cloud is not None:
        site = dataclasses.replace(
            site,
            cloud=CloudConfig(
                model=cloud.model,
                ttft=cloud.ttft,
                tpot=cloud.tpot,
                price_per_request=cloud.price_per_request,
                price_per_1000_tokens=cloud.price_per_1k_tokens,
                max_in_flight=cloud.max_in_flight,
            ),
        )
    around = Surroundings(
        site=site,
        log_length_error=tuple(expert.log_length_error for expert in fleet.experts),
        slots=slots_of(site),
        away=True,
        cloud_log_length_error=cloud.log_length_error if cloud else 0.5,
    )
    rule = rule_named(fleet.policy, away=True)
    return guarded(fleet.policy, rule_router(rule, around, fleet.rate or _USUAL_RATE), around, fleet)


def _of_run(path: Path, fleet: Fleet, folder: Path) -> tuple[Router, dict[str, Any]]:
    """Return a pretrained router, or that of a run, and its manifest."""
    # Imported here: rules and exports do without.
    from jaxroute.runs import PRETRAINED, pretrained_routers
    from jaxroute.training.export import router_of

    name = fleet.policy.removeprefix(f"{PRETRAINED}/")
    if name in pretrained_routers():
        run = Path(PRETRAINED) / name
    elif folder.exists():
        run = folder
    else:
        known = [*pretrained_routers(), *RULES]
        raise UserError(
            f"policy={fleet.policy} is no exported router, no run, no pretrained router and no rule"
            f"{did_you_mean(fleet.policy, known)}; choose a folder, or one of {', '.join(known)}"
        )
    site = None if fleet.site is None else site_named(path, fleet.site)
    router, manifest = router_of(run, site=site, rate=fleet.rate)
    check_experts(path, fleet, [expert["model"] for expert in manifest["site"]["experts"]], f"policy {fleet.policy}")
    return router, manifest


def _check_cloud(fleet: Fleet, site: SiteConfig, away: bool) -> None:
    if fleet.cloud is not None and (site.cloud is None or not away):
        raise UserError("cloud is given, and the policy knows none; export it with site.cloud, or leave cloud out")
    if fleet.cloud is None and site.cloud is not None and away:
        raise UserError("cloud is missing: the policy sends requests to one; say where it is")


def site_named(path: Path, name: str) -> SiteConfig:
    """Return a site of the configuration, or of a file.

    Raises:
        UserError: there is none.
    """
    if not name.endswith((".yaml", ".yml")):
        return load_config([f"site={name}"]).site
    file = path.parent / name
    try:
        site: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SiteConfig), OmegaConf.load(file)))
    except (OSError, OmegaConfBaseException, YAMLError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"site={name}: {file} cannot be read ({first}); name a site or its file") from None
    return site


def write_emulated_fleet(
    path: Path, config: Config, params: EnvParams, urls: list[str], speed: float, policy: str = EMULATED_POLICY
) -> None:
    """Write a fleet file for emulated servers of a site; and the site beside it, if it is none of configs/site.

    Quality and length are the means of the bank's predictions, and classes of service those of the workload. An
    exported router brings its site.
    """
    bank = params.bank
    quality = np.asarray(bank.predicted_quality).mean(0)
    length = np.median(np.asarray(bank.predicted_output_tokens), axis=0)
    error = np.asarray(bank.log_length_error)
    exported = (Path(policy) / MANIFEST).is_file()
    site: str | None = config.site.name
    if load_config([f"site={site}"]).site != config.site:
        site = f"{path.stem}-site.yaml"
        write_file(path.parent / site, OmegaConf.to_yaml(OmegaConf.structured(config.site)))
    fleet: dict[str, Any] = {
        "listen": "127.0.0.1:8080",
        "policy": str(Path(policy).resolve()) if exported else policy,
        "site": None if exported else site,
        "rate": float(np.mean(np.asarray(params.rate))),
        "speed": float(speed),
        "experts": [
            {
                "url": url,
                "model": model,
                "metrics": url.removesuffix("/v1") + "/metrics",
                "quality": round(float(quality[e]), 3),
                "output_tokens": round(float(length[e]), 1),
                "log_length_error": round(float(error[e]), 3),
            }
            for e, (url, model) in enumerate(zip(urls, config.site.models, strict=True))
        ],
        "classes": {
            requirement.name: {
                name: getattr(requirement, name)
                for name in ("ttft", "tpot", "e2e", "normalised")
                if getattr(requirement, name) is not None
            }
            for requirement in config.workload.requirements
        },
    }
    header = "# For the emulated servers of python -m jaxroute.emulate; docs/gateway.md explains every option.\n"
    write_file(path, header + OmegaConf.to_yaml(OmegaConf.create(fleet)))
