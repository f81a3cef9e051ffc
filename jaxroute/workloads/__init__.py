"""What arrives: arrival processes, recorded traces and request banks."""

from jaxroute.workloads.arrivals import PROCESSES, Workload, WorkloadConfig, build_workload
from jaxroute.workloads.bank import BankConfig, RequestBank, build_bank
from jaxroute.workloads.trace import Trace, read_trace

__all__ = [
    "PROCESSES",
    "BankConfig",
    "RequestBank",
    "Trace",
    "Workload",
    "WorkloadConfig",
    "build_bank",
    "build_workload",
    "read_trace",
]
