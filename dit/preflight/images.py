"""Images: open the source, count its classes, and decode a sample of its pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice

from dit.data.decoding import Encoded, Rejected, decode_or_reject, is_turned
from dit.data.ingest import open_source
from dit.data.sources import folder, huggingface, webdataset
from dit.errors import NAMED, UserError
from dit.preflight.deadline import within
from dit.preflight.finding import Finding, of_error
from dit.preflight.subject import Counts, Subject, key
from dit.sections import FolderSource, HuggingFaceSource, IdxSource, ImagesParams, UnlabelledSource, WebDatasetSource

WHAT = "images"
SAMPLE = 32
"""How many pictures are decoded."""
LARGEST = 256
"""The largest size in pixels to which pictures are scaled here: whether one can be decoded hardly depends on the size."""
ANSWER_SECONDS = 10.0
"""How long a data set on the hub may take to answer."""


def check(subject: Subject) -> Iterator[Finding]:
    """Open the source of images of every setting, and note the counts of images in the subject."""
    if not subject.runs("images"):
        return
    for params in subject.distinct("images"):
        images = params.images
        where = _where(images)
        try:
            yield from _look(subject, key(params, "images"), images, where)
        except UserError as error:
            yield of_error(WHAT, where, error)
        except ConnectionError as error:
            found = f"{error}; the images can be read only if this machine has them already"
            yield Finding(WHAT, where, found, "a data set on this machine, or a hub that answers", "warning")
        except OSError as error:
            yield Finding(WHAT, where, f"cannot be read: {error.strerror or error}", "files that can be read", "error")


def _where(images: ImagesParams) -> str:
    source = images.source
    for name in ("root", "path", "shards"):
        if hasattr(source, name):
            return f"images.source.{name} = {getattr(source, name)}"
    return f"images.source.kind = {source.kind}"


def _look(subject: Subject, name: str, images: ImagesParams, where: str) -> Iterator[Finding]:
    """Count the images if that is quick, and decode a sample."""
    source = images.source
    sample: list[Encoded] = []
    if isinstance(source, FolderSource | UnlabelledSource):
        train, validation = folder.pictures(images, source)
        counts = Counts(_per_class(train), _per_class(validation))
        sample = _spread([*train, *validation])
    elif isinstance(source, WebDatasetSource):
        counts, sample = None, webdataset.first_pictures(source, SAMPLE)
    elif isinstance(source, HuggingFaceSource):
        look = within(ANSWER_SECONDS, f"{where}: the hub", lambda: huggingface.first_pictures(source, SAMPLE))
        counts, sample = None, look
    else:
        opened = open_source(images)
        counts = Counts(opened.train.per_class, opened.validation.per_class)
        if isinstance(source, IdxSource):
            list(islice(opened.train.stream, SAMPLE))
    if counts:
        subject.counts[name] = counts
        said = f"{sum(counts.train)} images for training and {sum(counts.validation)} for validation, {_classes(counts)}"
        yield Finding(WHAT, where, said)
    if sample:
        yield from _decoded(images, sample, where)


def _per_class(pictures: list[Encoded]) -> tuple[int, ...]:
    counted = Counter(picture.label for picture in pictures)
    return tuple(counted[label] for label in sorted(counted))


def _classes(counts: Counts) -> str:
    if len(counts.train) == 1:
        return "all of one class"
    least, most = min(counts.train), max(counts.train)
    return f"in {len(counts.train)} classes of {least if least == most else f'{least} to {most}'}"


def _spread(pictures: list[Encoded]) -> list[Encoded]:
    """At most `SAMPLE` of the pictures, evenly spread over all of them."""
    count = min(SAMPLE, len(pictures))
    return [pictures[index * len(pictures) // count] for index in range(count)]


def _decoded(images: ImagesParams, sample: list[Encoded], where: str) -> Iterator[Finding]:
    """Decode the sample: report pictures that a stage would reject, and how many are rotated upright."""
    size = min(images.size, LARGEST)
    results = (decode_or_reject(picture, size, images.channels) for picture in sample)
    reasons = [result if isinstance(result, Rejected) else None for result in results]
    rejected = [reason for reason in reasons if reason]
    if len(rejected) > images.max_rejected * len(sample):
        named = "; ".join(f"{each.item}: {each.reason}" for each in rejected[:NAMED])
        few = len(rejected) < len(sample) / 2  # among all images, the rejected share may still be acceptable
        found = f"{len(rejected)} of {len(sample)} looked at are no usable images ({named})"
        expected = f"at most images.max_rejected = {images.max_rejected} of all"
        yield Finding(WHAT, where, found, expected, "warning" if few else "error")
        return
    turned = sum(is_turned(picture.data) for picture, reason in zip(sample, reasons, strict=True) if not reason)
    upright = f"; {turned} are turned upright, as their EXIF data says" if turned else ""
    yield Finding(WHAT, where, f"{len(sample) - len(rejected)} of {len(sample)} looked at can be decoded{upright}")
