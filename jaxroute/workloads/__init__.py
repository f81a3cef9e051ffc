"""What arrives when: arrival processes and recorded traces."""

from jaxroute.workloads.arrivals import PROCESSES, Workload, WorkloadConfig, build_workload, training_mix
from jaxroute.workloads.traces import Trace, read_trace

__all__ = [
    "PROCESSES",
    "Trace",
    "Workload",
    "WorkloadConfig",
    "build_workload",
    "read_trace",
    "training_mix",
]
