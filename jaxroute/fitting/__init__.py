"""Fits to what people have recorded: experts to serving logs and profiles, arrival processes to traces."""

from jaxroute.fitting.arrivals import ArrivalFit, fit_arrivals, synthetic_times
from jaxroute.fitting.calibration import COEFFICIENTS, Calibration, Limits, calibrate
from jaxroute.fitting.logs import ServingLog, read_log
from jaxroute.fitting.profiles import fit_profile

__all__ = [
    "COEFFICIENTS",
    "ArrivalFit",
    "Calibration",
    "Limits",
    "ServingLog",
    "calibrate",
    "fit_arrivals",
    "fit_profile",
    "read_log",
    "synthetic_times",
]
