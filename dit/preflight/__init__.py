"""Pre-flight: open everything that parameters name, before any work, and list all that is wrong with it at once.

Each module here checks one kind of thing. It opens files and reads shapes, counts and a sample, and computes nothing, so that
all of it takes seconds. What the stages of a study would refuse after hours is refused here in the same words.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from dit.config import Params
from dit.preflight import autoencoder, evaluation, images, model, resources
from dit.preflight.finding import Finding, Severity
from dit.preflight.subject import Subject

__all__ = ["CHECKS", "Finding", "Severity", "check", "errors", "merged"]

CHECKS: tuple[Callable[[Subject], Iterator[Finding]], ...] = (
    images.check,
    autoencoder.check,
    model.check,
    evaluation.check,
    resources.check,
)
"""In this order: what later ones need to know, such as the number of classes, earlier ones note in the subject."""


def check(params: Params, where: str = "params.yaml", stages: Collection[str] | None = None) -> list[Finding]:
    """What was opened, and what is wrong with it, at every setting of the study that `params` describe.

    `stages` are the kinds of stages that will run, such as `train`; what only others need is not opened. None is all of them.
    Raises `ConfigError` where a level of a factor does not fit the other parameters.
    """
    subject = Subject.of(params, where, stages)
    return list(dict.fromkeys(finding for each in CHECKS for finding in each(subject)))


def merged(findings: Collection[Finding], others: Collection[Finding]) -> list[Finding]:
    """`findings` and `others`. Where others find a key of the parameters wrong, what `findings` say of it is left out."""
    told = {finding.key for finding in others if finding.severity == "error"}
    return [*(finding for finding in findings if finding.key not in told), *others]


def errors(findings: Collection[Finding]) -> list[Finding]:
    """The findings that stop a study: with any of them, it cannot run."""
    return [finding for finding in findings if finding.severity == "error"]
