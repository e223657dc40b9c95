"""`python -m lyrics VERB`."""

import os

# Nothing phones home, whichever verb imports the hub's client first. What the user has set stays.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from lyrics.cli import main

main()
