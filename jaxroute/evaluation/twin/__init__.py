"""The twin of a fleet: from a log of real traffic to a verdict on other policies, with its own error.

recorded.py reads the log, servers.py fits the servers to its first part, simulate.py replays it in the environment with
the choices that were made or with those of a policy, drift.py sees a server change, judge.py puts all together, and
write.py says it in words, as JSON and as a page.
"""

from jaxroute.evaluation.twin.judge import Twin, judge
from jaxroute.evaluation.twin.recorded import MIN_REQUESTS, Recorded, read_recorded
from jaxroute.evaluation.twin.simulate import Contender
from jaxroute.evaluation.twin.write import verdict_lines, write_twin

__all__ = ["MIN_REQUESTS", "Contender", "Recorded", "Twin", "judge", "read_recorded", "verdict_lines", "write_twin"]
