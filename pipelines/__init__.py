"""Orchestration: DVC stage entry points, Prefect flows, the MLflow view and the report. No science lives here.

No tool that is used here sends usage data, unless its own switch says otherwise.
"""

import os

os.environ.setdefault("DO_NOT_TRACK", "true")  # prefect (client), mlflow and huggingface_hub all heed it
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
