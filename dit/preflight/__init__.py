"""Pre-flight: open everything that parameters name, before any work, and list all problems at once.

Each module here checks one kind of thing. It opens files and reads shapes, counts and a few samples, but computes nothing, so
the whole check takes seconds. What a stage would refuse after hours is refused here in the same words.
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
"""The checks, in order: earlier ones note in the subject what later ones need, such as the number of classes."""


def check(params: Params, where: str = "params.yaml", stages: Collection[str] | None = None) -> list[Finding]:
    """Open what the study of `params` needs at every setting, and report what was opened and what is wrong with it.

    `stages` are the kinds of stages that will run, such as `train`, or None for all; what only other stages need is not opened.
    Raises `ConfigError` if a level of a factor does not fit the other parameters.
    """
    subject = Subject.of(params, where, stages)
    return list(dict.fromkeys(finding for each in CHECKS for finding in each(subject)))


def merged(findings: Collection[Finding], others: Collection[Finding]) -> list[Finding]:
    """`findings` and `others`, but without the `findings` about any key of the parameters for which `others` has an error."""
    told = {finding.key for finding in others if finding.severity == "error"}
    return [*(finding for finding in findings if finding.key not in told), *others]


def errors(findings: Collection[Finding]) -> list[Finding]:
    """The findings that stop a study: with any of them, it cannot run."""
    return [finding for finding in findings if finding.severity == "error"]
