"""Remove passwords from everything that is shown: messages, logs, artifacts and tags.

Passwords are in addresses such as `postgresql://user:secret@host/mlflow`, or in variables of their own. Other programs repeat
them in their errors: unchanged, decoded, or encoded.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator, Mapping
from urllib.parse import quote, quote_plus, unquote, unquote_plus

HIDDEN = "***"
ADDRESSES = ("MLFLOW_TRACKING_URI", "MLFLOW_BACKEND_STORE_URI", "PREFECT_API_URL", "PREFECT_API_DATABASE_CONNECTION_URL")
"""Variables whose value is an address that may hold a password."""
SECRETS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "PREFECT_API_AUTH_STRING", "PREFECT_API_KEY")
"""Variables whose value is a password."""
SHORTEST = 4
"""Shorter passwords are removed from addresses, but not from other text, in which they might be part of any word."""
USERINFO = re.compile(r"(?<=://)(?!/)(?:([^\s/:@?#]*):(\S*)|([^\s/:@?#]+))(?=@)(?!@\S*@)")
"""User and password of an address, up to its last `@`, because a password may hold any character of an address.

Without a colon, the word before the `@` is a user's name or an access token; nothing tells which.
"""
QUERY = re.compile(r"(?<=[?&])((?:\w*_|ssl)?(?:password|passwd|pwd|token|secret|api_?key))=([^&\s#]+)", re.IGNORECASE)


def shown(address: str) -> str:
    """An address, or text with addresses, without their passwords."""
    hidden = USERINFO.sub(lambda found: HIDDEN if found[1] is None else f"{found[1]}:{HIDDEN}", address)
    return QUERY.sub(rf"\1={HIDDEN}", hidden)


def redacted(text: str, *addresses: str, environment: Mapping[str, str] = os.environ) -> str:
    """`text` of another program without the passwords of `addresses` and of the environment, in any of their forms."""
    known = [*addresses, *(environment.get(name, "") for name in ADDRESSES)]
    secrets = [secret for address in known for secret in _secrets(address)]
    secrets += [environment.get(name, "") for name in SECRETS]
    forms = {form for secret in secrets if len(secret) >= SHORTEST for form in _forms(secret)}
    text = shown(text)
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, HIDDEN)
    return text


def _secrets(address: str) -> Iterator[str]:
    for user, password, token in USERINFO.findall(address):
        yield from (password or token, f"{user}:{password}")
    yield from (secret for _, secret in QUERY.findall(address))


def _forms(secret: str) -> Iterator[str]:
    """The forms in which errors repeat a secret: as given, decoded, encoded, as in `repr`, and as in an HTTP header."""
    for plain in {secret, unquote(secret), unquote_plus(secret)}:
        yield from (plain, quote(plain), quote(plain, safe=""), quote_plus(plain), repr(plain)[1:-1])
        yield base64.b64encode(plain.encode(errors="surrogateescape")).decode()
