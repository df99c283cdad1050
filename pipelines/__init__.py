"""Orchestration: DVC stage entry points, Prefect flows, the MLflow view and the report. No science lives here.

No tool that is used here sends usage data, unless its own switch says otherwise.

What torch compiles is kept with the project's scratch files. Torch's default is a folder of /tmp that any user of the machine
may make first, and fill with code. The settings of matplotlib, which torchmetrics imports, are kept there too. Where matplotlib
cannot write in the user's home, it makes a folder in /tmp, and each fork of the process that made it would remove it.
"""

import os

os.environ.setdefault("DO_NOT_TRACK", "true")  # prefect (client), mlflow and huggingface_hub all heed it
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.update(
    {
        variable: os.path.abspath(f"{'.scratch' if '://' in scratch else scratch}/{folder}")
        for scratch in [os.environ.get("DIT_SCRATCH") or ".scratch"]
        for variable, folder in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("MPLCONFIGDIR", "matplotlib"))
        if variable not in os.environ
    }
)
