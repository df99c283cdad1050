from .api import (
    Comparison as Comparison,
    Model as Model,
    Run as Run,
    audit_model as audit_model,
    compare as compare,
    sample as sample,
    train as train,
)
