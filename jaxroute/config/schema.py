"""Configuration: every option, typed, and how the command line becomes it.

The YAML files under configs/ are Hydra groups; these dataclasses are their schema. Values are checked here, before
anything is compiled or written.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from jaxroute.banks import BankConfig
from jaxroute.errors import UserError
from jaxroute.learning import PPOConfig, WarmStartConfig
from jaxroute.networks import NetworkConfig
from jaxroute.serving import SiteConfig
from jaxroute.workloads import PROCESSES, WorkloadConfig


def _check_seed(where: str, seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise UserError(f"{where}seed={seed} must lie between 0 and 4294967295")


@dataclass
class RewardConfig:
    """The tailored reward; a weight of 0 switches a part off."""

    accelerator_price: float = 0.02
    """Price of one busy accelerator-second, in QoS: what it must bring in to be worth spending."""
    quality_floor: float = 0.0
    """An answer whose predicted quality is below this is worth nothing, whatever it turns out to be."""
    class_floor: dict[str, float] = field(default_factory=dict)
    """Least share of the latest requests of a class of service that must not be declined, by name, for instance
    {relaxed: 0.5}; the others have no floor."""
    shaping: bool = True
    """Potential-based shaping with the estimator's expected QoS of all requests in flight."""
    expected_quality: bool = True
    """Reward the predicted quality instead of the drawn outcome. It has far less noise and the same mean, provided that
    quality and timing are independent given the predictions."""

    def __post_init__(self) -> None:
        if not 0 <= self.accelerator_price < float("inf"):
            raise UserError(f"reward: accelerator_price={self.accelerator_price} must not be negative, and finite")
        floors = {"quality_floor": self.quality_floor} | {f"class_floor.{k}": v for k, v in self.class_floor.items()}
        for name, floor in floors.items():
            if not 0 <= floor <= 1:
                raise UserError(f"reward: {name}={floor} must lie between 0 and 1")


@dataclass
class EnvConfig:
    """What a router may do."""

    away: bool = True
    """One more action: to decline a request at once, or to send it to the site's cloud. false: every request must go to
    an expert, and full queues choose who goes without."""
    num_slots: int | None = None
    """Most requests that the simulation holds at an expert at once; what would not fit is counted as overflowed. null:
    its seats and its queue, or, where the queue has no bound, its share of what arrives in ten seconds, and no more
    than it has seats."""
    see_prefixes: bool = True
    """Where prefixes are cached, let the router see how much of the arriving prompt each expert has."""

    def __post_init__(self) -> None:
        if self.num_slots is not None and self.num_slots < 1:
            raise UserError(f"env: num_slots={self.num_slots} must be at least 1")


MOST_GATEWAYS = 16
"""At one site; each has arrays of its own in every environment."""


@dataclass
class DynamicsConfig:
    """What goes wrong at the site: experts that fail, and metrics that come late."""

    outages: str = "none"
    """What happens to the requests of an expert that fails: lost or retried; with none, no expert fails."""
    mean_uptime: float = 600.0
    """Mean time between repair and the next failure of an expert, s."""
    mean_downtime: float = 60.0
    """Mean time to repair, s."""
    refresh_interval: float = 0.0
    """Minimum time between two updates of what the router sees of the experts, s; 0 shows their present state. With
    gateways: time between two polls of the servers' gauges. Training may draw it (train.refresh_intervals)."""
    gateways: int | None = None
    """Number of gateways that share the site. Each knows its own requests at once, and of the others' what the servers'
    gauges say: how many run and wait, and the memory that they hold. null: the router sees every request."""
    first_poll: float = 0.0
    """Time until gateways read the gauges for the first time, s."""
    random_sites: float = 0.0
    """Share of episodes that draw a new site from the site's experts and LLMs. Training uses train.random_sites."""

    def __post_init__(self) -> None:
        if self.outages not in ("none", "lost", "retried"):
            raise UserError(f"dynamics: outages={self.outages} is unknown; choose none, lost or retried")
        for name in ("mean_uptime", "mean_downtime"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"dynamics: {name}={getattr(self, name)} must be above 0 s, and finite")
        if not 0 <= self.random_sites <= 1:
            raise UserError(f"dynamics: random_sites={self.random_sites} is a share; it must lie between 0 and 1")
        for name in ("refresh_interval", "first_poll"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"dynamics: {name}={getattr(self, name)} must not be negative, and finite")
        if self.gateways is not None and not 1 <= self.gateways <= MOST_GATEWAYS:
            raise UserError(
                f"dynamics: gateways={self.gateways} must be from 1 to {MOST_GATEWAYS}, or null for a router that sees "
                "every request"
            )
        if self.gateways is None and self.first_poll:
            raise UserError(f"dynamics: first_poll={self.first_poll} needs gateways, which read gauges; set gateways=1")


@dataclass
class TrainConfig:
    """How to train."""

    loads: list[float] = field(default_factory=lambda: [0.25, 5.4])
    """Least and greatest load, as multiples of the workload's rate; one number stands for both. Each environment draws
    its own in between, so that one router learns what to do when the site is quiet and when it is overloaded: at 5.4
    times its rate, edge6 gets three times what it can serve."""
    accelerator_prices: list[float] | None = None
    """Least and greatest reward.accelerator_price, or one number for both; each environment draws its own in between,
    and the router sees it, so that it can be used at any of them. null: reward.accelerator_price alone."""
    cloud_prices: list[float] = field(default_factory=lambda: [1.0, 1.0])
    """Least and greatest multiple of the prices of site.cloud; likewise."""
    quality_floors: list[float] | None = None
    """Least and greatest reward.quality_floor; likewise. The router sees what is below it as predicted to be 0."""
    refresh_intervals: list[float] | None = None
    """Least and greatest dynamics.refresh_interval; likewise, and the router sees how old its gauges are. null:
    dynamics.refresh_interval alone."""
    gateways: list[int] | None = None
    """Least and greatest dynamics.gateways, or one number for both; likewise. null: dynamics.gateways alone."""
    redraw_every: int = 512
    """Steps after which an environment draws a new load."""
    arrivals: str | None = "mixed"
    """Arrival process to train on. mixed: each environment draws Poisson, clustered, bursty or drifting arrivals, or
    the workload's own where those are something else, so that the router copes with traffic it has not seen; null: the
    workload's own alone."""
    random_sites: float = 0.5
    """Share of environments that draw a new site from the site's experts and LLMs at the start and at each horizon."""
    horizon: int = 0
    """Steps after which an environment starts again; 0 never does."""
    log_interval: int = 10
    """Maximum updates per host sync, lowered to a divisor of the total."""
    num_seeds: int = 1
    """Number of routers to train in parallel in one program, with seeds seed, seed + 1, ..."""
    distributed: bool = False
    """Train in several processes together. Start each with the same options."""
    evaluate: bool = True
    """Judge the trained router against the rules after training."""
    save_interval: int = 10
    """Maximum host syncs between two saves of the state that a run resumes from."""
    keep: int = 2
    """Number of latest states to keep, in addition to the one with the best average QoS."""

    def __post_init__(self) -> None:
        for name in ("loads", "accelerator_prices", "cloud_prices", "quality_floors", "refresh_intervals", "gateways"):
            if len(getattr(self, name) or ()) == 1:
                setattr(self, name, getattr(self, name) * 2)
        if len(self.loads) != 2 or not 0 < self.loads[0] <= self.loads[1] < float("inf"):
            raise UserError(f"train: loads={list(self.loads)} must be one or two numbers, 0 < least <= greatest")
        for name in ("accelerator_prices", "cloud_prices", "refresh_intervals"):
            bounds = getattr(self, name)
            if bounds is not None and (len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1] < float("inf")):
                raise UserError(f"train: {name}={list(bounds)} must be one or two numbers, 0 <= least <= greatest")
        numbers = self.gateways
        if numbers is not None and (len(numbers) != 2 or not 1 <= numbers[0] <= numbers[1] <= MOST_GATEWAYS):
            raise UserError(
                f"train: gateways={list(numbers)} must be one or two numbers, 1 <= least <= greatest <= {MOST_GATEWAYS}"
            )
        floors = self.quality_floors
        if floors is not None and (len(floors) != 2 or not 0 <= floors[0] <= floors[1] <= 1):
            raise UserError(
                f"train: quality_floors={list(floors)} must be one or two numbers, 0 <= least <= greatest <= 1"
            )
        for name in ("redraw_every", "log_interval", "num_seeds", "save_interval", "keep"):
            if getattr(self, name) < 1:
                raise UserError(f"train: {name}={getattr(self, name)} must be at least 1")
        if self.arrivals is not None and self.arrivals not in PROCESSES:
            raise UserError(
                f"train: arrivals={self.arrivals} is unknown; choose one of {', '.join(PROCESSES)}, or null"
            )
        if not 0 <= self.random_sites <= 1:
            raise UserError(f"train: random_sites={self.random_sites} is a share; it must lie between 0 and 1")
        if self.horizon < 0:
            raise UserError(f"train: horizon={self.horizon} must not be negative; 0 is endless")


@dataclass
class EvalConfig:
    """How to judge."""

    episodes: int = 16
    """Number of independent episodes, the same ones for every policy."""
    requests: int = 800
    """Requests per episode that count towards the results."""
    warmup: int = 300
    """Requests at the start of an episode that do not count, while the site fills up."""
    loads: list[float] = field(default_factory=lambda: [0.5, 1.0, 1.5])
    """Multiples of the workload's rate to judge at; 1 is always among them."""
    seed: int = 1_000_000
    """Seed of the episodes."""

    def __post_init__(self) -> None:
        if self.episodes < 1 or self.requests < 1 or self.warmup < 0:
            raise UserError(
                f"eval: episodes={self.episodes} and requests={self.requests} must be at least 1, "
                f"warmup={self.warmup} at least 0"
            )
        if any(not 0 < load < float("inf") for load in self.loads):
            raise UserError(f"eval: loads={list(self.loads)} must all be above 0")
        _check_seed("eval: ", self.seed)


@dataclass
class StudySetting:
    """One setting of a study: the options of the command line changed by its own."""

    name: str = MISSING
    """Names its file, tables and figures."""
    overrides: list[str] = field(default_factory=list)
    """Options as on the command line, e.g. workload=gamma."""
    loads: list[float] = field(default_factory=lambda: [1.0])
    """Multiples of the workload's rate to judge at."""


@dataclass
class StudyConfig:
    """A study as written in configs/study: routers and rules judged in many settings."""

    name: str = MISSING
    """Names the folder outputs/study-<name>."""
    settings: list[StudySetting] = field(default_factory=list)
    """Where everybody is judged."""
    routers: dict[str, list[str]] = field(default_factory=dict)
    """Label of a trained router to its runs, one per training seed. The first is compared with all others."""
    rules: list[str] | None = None
    """Rules to judge; all by default."""
    planners: list[str] = field(default_factory=list)
    """lookahead, clairvoyant: judged on episodes of their own, since each of their decisions takes long."""
    planner_episodes: int = 8
    """Episodes for planners."""
    planner_requests: int = 200
    """Requests of each such episode that count."""
    planner_warmup: int = 100
    """Requests before those, which do not count."""
    planner_futures: int = 12
    """Futures that lookahead draws for a decision."""
    planner_horizon: int = 40
    """Decisions that planners look ahead."""

    def __post_init__(self) -> None:
        where = f"study {self.name}"
        if not self.settings:
            raise UserError(f"{where}: settings is empty; list at least one")
        names = [setting.name for setting in self.settings]
        for setting in self.settings:
            if not re.fullmatch(r"[\w-]+", setting.name) or names.count(setting.name) > 1:
                raise UserError(
                    f"{where}: setting name {setting.name!r} names a file: use letters, digits, - and _, each name once"
                )
            if not setting.loads or any(not 0 < load < float("inf") for load in setting.loads):
                raise UserError(f"{where}: setting {setting.name}: loads={list(setting.loads)} must be numbers above 0")
        for label, runs in self.routers.items():
            if not runs:
                raise UserError(
                    f"{where}: routers.{label} is empty; name its runs, e.g. study.routers.{label}=[outputs/<run>]"
                )
        least = {"episodes": 1, "requests": 1, "warmup": 0, "futures": 1, "horizon": 2}
        for name, bound in least.items():
            if getattr(self, f"planner_{name}") < bound:
                raise UserError(f"{where}: planner_{name}={getattr(self, f'planner_{name}')} must be at least {bound}")


@dataclass
class WandbConfig:
    """Weights & Biases tracking."""

    mode: str = "disabled"
    """disabled, offline (writes to the run directory, needs no account) or online."""
    project: str = "jaxroute"
    """Name of the W&B project."""
    group: str | None = None
    """Name that runs share, such as the seeds of one setting."""
    tags: list[str] = field(default_factory=list)
    """Labels of the run."""

    def __post_init__(self) -> None:
        if self.mode not in ("disabled", "offline", "online"):
            raise UserError(f"wandb: mode={self.mode} is unknown; choose disabled, offline or online")


@dataclass
class Config:
    """All options of train.py and eval.py."""

    site: SiteConfig = MISSING
    workload: WorkloadConfig = MISSING
    bank: BankConfig = MISSING
    network: NetworkConfig = MISSING
    ppo: PPOConfig = MISSING
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    env: EnvConfig = field(default_factory=EnvConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    dynamics: DynamicsConfig = field(default_factory=DynamicsConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    study: StudyConfig | None = None
    """eval: judge in many settings instead of one."""
    seed: int = 0
    """Seed of everything random in training."""
    data_dir: str | None = None
    """Folder with recorded traces and published banks; by default, what the environment variable JAXROUTE_DATA says."""
    output_dir: str | None = None
    """Folder that the run writes into; outputs/<time>-<what> by default."""
    checkpoint: str | None = None
    """eval: a run directory or one of its checkpoints. Without one, only the rules are compared."""
    policies: list[str] | None = None
    """Rules to compare with; all by default."""
    resume: str | None = None
    """train: a run directory. Its training continues as if it had never been interrupted, with its own options."""
    fork: str | None = None
    """train: a run directory, or one of its states or checkpoints. A new run starts from it, with its options unless
    the command line changes them."""
    view: str | None = None
    """eval: record one episode of this policy (jaxroute or a rule) to watch in a browser, instead of judging."""

    def __post_init__(self) -> None:
        _check_seed("", self.seed)
        _check_seed("the last of train.num_seeds: ", self.seed + self.train.num_seeds - 1)

    @property
    def data_path(self) -> Path | None:
        """The data folder, if one is set."""
        folder = self.data_dir or os.environ.get("JAXROUTE_DATA")
        return Path(folder) if folder else None
