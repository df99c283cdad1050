"""Audit of any network: how it is initialised, found from what it does."""

from dit.audit.measure import audit
from dit.audit.report import AuditReport

__all__ = ["AuditReport", "audit"]
