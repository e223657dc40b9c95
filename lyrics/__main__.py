"""`python -m lyrics VERB`."""

import os

# Nothing phones home, whichever verb imports the hub's client first. What the user has set stays.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# A thread of torch that waits for another soon sleeps. By default it spins for milliseconds, and where anything else
# wants the processor, that is the time which the other thread lacks. torch reads this when it is first imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from lyrics.cli import main

main()
