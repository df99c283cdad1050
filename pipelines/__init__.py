"""Orchestration: DVC stage entry points, Prefect flows, the MLflow view and the report. No science lives here.

No tool that is used here sends usage data, unless the user sets the tool's own switch.

Torch keeps its compiled code with the project's scratch files, because its default is a folder in /tmp that any user of the
machine may create first and fill with code. The settings of matplotlib, which torchmetrics imports, are kept there too: if
matplotlib cannot write in the user's home, it makes a folder in /tmp, which every fork of its process would remove.

Torch compiles in the process of a stage. By default it starts a process for each core, and waits for them when the stage ends.
Where 15 stages shared a GPU, stages took 10 s to end, probably for this reason. Most find their kernels compiled on disk.
"""

import os

os.environ.setdefault("DO_NOT_TRACK", "true")  # prefect (client), mlflow and huggingface_hub all heed it
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.update(
    {
        variable: os.path.abspath(f"{'.scratch' if '://' in scratch else scratch}/{folder}")
        for scratch in [os.environ.get("DIT_SCRATCH") or ".scratch"]
        for variable, folder in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("MPLCONFIGDIR", "matplotlib"))
        if variable not in os.environ
    }
)
