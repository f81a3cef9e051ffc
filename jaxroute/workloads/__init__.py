"""What arrives when: arrival processes and recorded traces."""

from jaxroute.workloads.arrivals import PROCESSES, Workload, WorkloadConfig, build_workload, training_mix
from jaxroute.workloads.prefixes import PrefixCache, Prefixes, hit_rate
from jaxroute.workloads.traces import Trace, read_trace

__all__ = [
    "PROCESSES",
    "PrefixCache",
    "Prefixes",
    "Trace",
    "Workload",
    "WorkloadConfig",
    "build_workload",
    "hit_rate",
    "read_trace",
    "training_mix",
]
