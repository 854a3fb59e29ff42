"""Requests to the Hub: who may see the token, what an answer means, which faults another attempt may cure."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, cast
from urllib.parse import quote, urljoin, urlsplit

from ..errors import AccessError, ConnectionFault, DbrxError, InputError, ModelError
from ..json_text import CONFIG, parse
from .listing import COMMIT, HubFile, ListingFault, check_together
from .retry import AGAIN, FEW_TRIES, RetryPolicy, Transient

ANSWER = CONFIG  # the listing of a real repository has some KB, a page of 1000 files 0.4 MB and 15,000 entries
MOST_PAGES = 100


class NoSuchRevision(ModelError):
    """The repository exists, the revision does not."""


class NoSuchFile(ModelError):
    """The revision exists, the file does not."""


class NoAccess(AccessError):
    """The Hub refuses; `code` is its own name for why (GatedRepo, RepoNotFound), maybe empty."""

    code = ""


@dataclass(frozen=True)
class Hub:
    """One repository as one person sees it. The token goes to the endpoint's origin and nowhere else."""

    name: str
    endpoint: str
    token: str | None = field(default=None, repr=False)

    @classmethod
    def connect(cls, name: str, token: str | bool | None) -> Hub:
        """Endpoint and token as every Hub client finds them: HF_ENDPOINT, HF_TOKEN, or the saved login."""
        from huggingface_hub import constants, get_token

        if token is True or (token is None and not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN):
            found = get_token()
        else:
            found = token or None
        if token is True and found is None:
            raise AccessError("no token found", "set HF_TOKEN, or log in with: hf auth login")
        if found is not None and not re.fullmatch(r"[!-~]+", found):
            raise AccessError("the Hub token holds characters that no token has", "set HF_TOKEN again")
        endpoint = constants.ENDPOINT.rstrip("/")
        if _origin(endpoint) is None:
            raise InputError("HF_ENDPOINT is not the address of a server", "it looks like https://huggingface.co")
        return cls(name, endpoint, found)

    def commit(self, revision: str, policy: RetryPolicy) -> str:
        """The commit that a branch or tag points to."""
        if COMMIT.fullmatch(revision):
            return revision
        try:
            answer, _ = self._json(f"{self._api}/revision/{quote(revision, safe='')}", policy)
        except NoSuchRevision as fault:
            raise ModelError(fault.message, self._revisions(policy)) from None
        commit = answer.get("sha") if isinstance(answer, dict) else None
        if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
            raise self._not_a_hub()
        return commit

    def tree(self, commit: str, policy: RetryPolicy) -> list[HubFile]:
        """All files of a commit; `ModelError` if the listing makes no sense."""
        try:
            return self._tree(commit, policy)
        except ListingFault as fault:
            raise ModelError(
                f"{self.name}: {fault.message}", fault.hint or "run the same command again later"
            ) from None

    def _tree(self, commit: str, policy: RetryPolicy) -> list[HubFile]:
        files: list[HubFile] = []
        url: str | None = f"{self._api}/tree/{commit}?recursive=true&expand=false"
        for _ in range(MOST_PAGES):
            if url is None:
                check_together(files)
                return files
            entries, url = self._json(url, policy)
            if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
                raise self._not_a_hub()
            if not all(isinstance(entry.get("type"), str) for entry in entries):
                raise ListingFault("the listing does not say what is a file")
            files += [HubFile.from_listing(entry) for entry in entries if entry.get("type") == "file"]
        raise self._not_a_hub()

    def file_url(self, path: str, commit: str) -> str:
        """Where the bytes of a file are asked for; the Hub redirects to its storage."""
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.name, path, revision=commit, endpoint=self.endpoint)

    @contextmanager
    def get(self, url: str, policy: RetryPolicy, start: int = 0) -> Iterator[Any]:
        """A streamed answer, from byte `start`; raises `Transient` for what another attempt may cure.

        The session's client drops the authorization header when a redirect leaves the origin.
        """
        import huggingface_hub
        from huggingface_hub import constants, get_session
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # the http client's base error

        headers = {"user-agent": f"dbrx; hf_hub/{huggingface_hub.__version__}", "accept-encoding": "identity"}
        if start:
            headers["range"] = f"bytes={start}-"
        if self.token and _origin(url) == _origin(self.endpoint):
            headers["authorization"] = f"Bearer {self.token}"
        timeout = min(float(constants.HF_HUB_DOWNLOAD_TIMEOUT), max(policy.left, 0.5))
        try:
            with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
                if response.status_code not in (200, 206):
                    raise self._refusal(response)
                yield response
        except HTTPError as error:
            raise _network_fault(error, url) from None
        except Exception as error:
            # A name that is none, as the client says it or, in IDNA, Python: neither is an HTTPError.
            if not isinstance(error, UnicodeError) and type(error).__name__ != "InvalidURL":
                raise
            raise self._not_a_hub() from None

    @property
    def _api(self) -> str:
        return f"{self.endpoint}/api/models/{self.name}"

    @property
    def shown(self) -> str:
        """The endpoint as messages name it: without a user and a password."""
        return re.sub(r"(?<=//)[^/]*@", "", self.endpoint)

    def _json(self, url: str, policy: RetryPolicy) -> tuple[Any, str | None]:
        """A parsed answer and the address of the next page."""

        def attempt() -> tuple[Any, str | None]:
            with self.get(url, policy) as response:
                body = bytearray()
                for chunk in response.iter_raw():
                    body += chunk
                    policy.reached(len(body))
                    if len(body) > ANSWER.nbytes:
                        raise self._not_a_hub()
                following = response.links.get("next", {}).get("url")
            try:
                return parse(bytes(body), ANSWER), urljoin(url, following) if following else None
            except ValueError:
                raise Transient(self._not_a_hub()) from None

        return policy.persist(attempt)

    def _revisions(self, policy: RetryPolicy) -> str | None:
        """A hint that lists the branches and tags, if the Hub tells them."""
        try:
            refs, _ = self._json(f"{self._api}/refs", policy)
            names = [self._clean(str(ref["name"])) for kind in ("branches", "tags") for ref in refs.get(kind, [])]
        except (DbrxError, AttributeError, KeyError, TypeError):
            return None
        return f"revisions of {self.name}: {', '.join(names[:20])}" if names else None

    def _refusal(self, response: Any) -> Exception:
        """What an answer other than 200 and 206 means."""
        status, code = response.status_code, response.headers.get("x-error-code", "")
        said = self._said(response)
        if status in (408, 425, 429) or status >= 500:
            pause = _asked_pause(response.headers)
            wait = f" and asks to wait {pause:.0f} seconds" if pause is not None else ""
            return Transient(ConnectionFault(f"{response.url.host} answered {said}{wait}", AGAIN), pause=pause)
        if status == 416:
            return Transient(ConnectionFault(f"{response.url.host} answered {said}", AGAIN), restart=True)
        if _origin(str(response.url)) != _origin(self.endpoint):
            # The link to the storage ran out, most likely: the next attempt asks the Hub for a new one.
            return Transient(ConnectionFault(f"{response.url.host} answered {said}", AGAIN))
        if code == "RevisionNotFound":
            return NoSuchRevision(f"{self.name} has no such revision: {self.shown} answered {said}")
        if code == "EntryNotFound":
            return NoSuchFile(f"{self.name} has no such file: {self.shown} answered {said}")
        if code in ("GatedRepo", "RepoNotFound") or status in (401, 403):
            return self._no_access(code, said)
        return ConnectionFault(f"{self.shown} answered {said} for {self.name}", "check HF_ENDPOINT, or try later")

    def _no_access(self, code: str, said: str) -> AccessError:
        others = "give a local folder or another Hub id (org/name), or set HF_ENDPOINT to a mirror that has it"
        if not self.token:
            others += "; no HF_TOKEN is set: set one if you were given access"
        if code == "GatedRepo" and not self.name.startswith("databricks/"):  # those are closed: nobody can ask
            others = f"ask for access at {self.shown}/{self.name}, or {others}"
        fault = NoAccess(f"the Hub gives no access to {self.name}: {self.shown} answered {said}", others)
        fault.code = code
        return fault

    def _said(self, response: Any) -> str:
        """Status and message of an answer."""
        words = self._clean(response.headers.get("x-error-message", ""))
        return f"{response.status_code} ({words})" if words else str(response.status_code)

    def _clean(self, words: str) -> str:
        """What a server says, on one line of no more than 300 characters; if it repeats the token, that is left out."""
        words = " ".join(words.split())[:300]
        if self.token:
            words = words.replace(self.token, "[token]")
        return "".join(c for c in words if c.isprintable())

    def _not_a_hub(self) -> ConnectionFault:
        return ConnectionFault(f"{self.shown} does not answer like a Hugging Face Hub", "check HF_ENDPOINT")


def _origin(url: str) -> tuple[str, str, int | None] | None:
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        return None
    fits = parts.scheme in ("http", "https") and parts.hostname and url.isprintable() and " " not in url
    return (parts.scheme, cast(str, parts.hostname), port) if fits else None


def _network_fault(error: Exception, url: str) -> Transient:
    """A fault of the transport; its own text is not repeated, it may hold headers or signed addresses."""
    kind = type(error).__name__
    host = urlsplit(url).hostname
    if kind in ("ConnectError", "ConnectTimeout", "ProxyError", "UnsupportedProtocol"):
        text = f"{host} cannot be reached"
        hint = "check the network and HF_ENDPOINT, or give a local folder"
        return Transient(ConnectionFault(text, hint), tries=None if kind == "ConnectTimeout" else FEW_TRIES)
    text = f"{host} stopped answering" if "Timeout" in kind else f"{host} broke off the connection"
    return Transient(ConnectionFault(text, AGAIN))


def _asked_pause(headers: Any) -> float | None:
    """Seconds that the server asks to wait: RateLimit (IETF draft) or Retry-After (RFC 9110, seconds or a date)."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
