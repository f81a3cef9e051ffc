"""What arrives: arrival processes, recorded traces and request banks."""

from jaxroute.workloads.arrivals import Workload, WorkloadConfig, build_workload
from jaxroute.workloads.bank import BankConfig, RequestBank, build_bank
from jaxroute.workloads.trace import Trace, read_azure_trace

__all__ = [
    "BankConfig",
    "RequestBank",
    "Trace",
    "Workload",
    "WorkloadConfig",
    "build_bank",
    "build_workload",
    "read_azure_trace",
]
