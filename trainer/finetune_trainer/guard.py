"""Tell a loss that has gone wrong from one that is merely unsteady (pure)."""

import math
import statistics
from collections.abc import Sequence

# Number of steps over which the loss is averaged and judged. A fixed number of steps, so that the verdict never depends on time.
STEPS_BETWEEN_VERDICTS = 10
MAX_LEVELS = 20
MAX_ROLLBACKS = 3
RATE_FACTOR = 0.3
# Learning that goes well does not come back to ten times its usual loss. That alone would also catch the step from 0.001 to 0.02
# of an all but finished run, so the loss must be far beyond that of guessing, log K, as well.
JUMP = 10.0
WORSE_THAN_GUESSING = 3.0


def find_trouble(loss: float, levels: Sequence[float], *, num_classes: int) -> str | None:
    """Return what is wrong with a loss after the earlier `levels`, or None."""
    if not math.isfinite(loss):
        return f"the loss was {loss}"
    guessing = math.log(max(2, num_classes))
    if levels and loss > JUMP * statistics.median(levels) and loss > WORSE_THAN_GUESSING * guessing:
        return f"the loss rose from {statistics.median(levels):.3g} to {loss:.3g}"
    return None
