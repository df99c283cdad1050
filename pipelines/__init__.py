"""Orchestration: DVC stage entry points, Prefect flows, the MLflow view and the report. No science lives here.

No tool that is used here sends usage data, unless its own switch says otherwise. What torch compiles is kept with the project's
scratch files: torch's own default is a folder of /tmp that any user of the machine may make first, and fill with code.
"""

import os

os.environ.setdefault("DO_NOT_TRACK", "true")  # prefect (client), mlflow and huggingface_hub all heed it
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    os.path.abspath(
        ".scratch/inductor" if "://" in os.environ.get("DIT_SCRATCH", "://") else f"{os.environ['DIT_SCRATCH']}/inductor"
    ),
)
