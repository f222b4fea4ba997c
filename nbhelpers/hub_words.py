"""What the hub said, in sentences: a token that it refuses, one that may not, a name that it lacks, and no network.

huggingface_hub and datasets answer several of these with one error, "cannot find it in the cache", and the real one in
its chain.
"""

import re
import socket
from collections.abc import Iterator

TOKENS = "https://huggingface.co/settings/tokens"


def checked_token(token: str | None) -> str | None:
    """Without the white space around it. ValueError for what no token holds, which the HTTP library would refuse in an
    error that shows it whole."""
    token = (token or "").strip()
    if not re.fullmatch(r"[!-~]*", token):
        raise ValueError("the token has a space, a line end or a special character in it: copy it once more, alone")
    return token or None


def token_in_use(token: str | None) -> str | None:
    """The token that huggingface_hub would send: `token`, else HF_TOKEN or an earlier login's. ValueError as
    `checked_token`."""
    import huggingface_hub

    return checked_token(token) or checked_token(huggingface_hub.get_token())


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def status(error: BaseException) -> int | None:
    """The HTTP status in an error or one that it was raised from; None if nobody answered."""
    responses = (vars(one).get("response") for one in chain(error))
    return next((response.status_code for response in responses if response is not None), None)


def unanswered(error: BaseException) -> bool:
    """Whether it comes from a connection that could not be made, or broke."""
    return any(isinstance(one, (ConnectionError, TimeoutError, socket.gaierror)) for one in chain(error))


def refused_push(name: str, error: Exception, token: str | None) -> Exception:
    """The error to raise where an upload to the repository `name` failed with `error`: PermissionError (401, 403),
    ValueError (404 and what else the hub does not take) or ConnectionError. `token` is shown nowhere."""
    missing = any(type(one).__name__ == "LocalTokenNotFoundError" for one in chain(error))
    answer = 401 if missing else status(error)
    write = f'Make one with write access at {TOKENS} and pass export.push(..., token="hf_...") or set HF_TOKEN'
    if answer == 401:
        return PermissionError(
            f"the hub does not know this token (401): it may be cut off, expired or revoked, or there is none. {write}"
        )
    if answer == 403:
        return PermissionError(
            f"the hub does not let this token write to {name} (403): it may only read, or the owner is another. {write}"
        )
    if answer == 404:
        return ValueError(
            f"the hub has no place {name!r} for this token (404): is the owner, before the /, your user name or an "
            "organization that you may write to?"
        )
    if answer is not None and answer < 500 and answer not in (408, 429):
        said = " ".join(str(vars(error).get("server_message") or "").split())[:300]
        said = said.replace(token, "...") if token else said
        return ValueError(f"the hub does not take this upload to {name} ({answer}){': ' if said else ''}{said}")
    return refusal("repository", name, error, has_token=True, pass_token="set HF_TOKEN",
                   copy="push later: the folder stays")  # fmt: skip


def licence(name: str, pass_token: str, kind: str = "model") -> str:
    """How to get what asks for its licence to be accepted; the arguments are those of `refusal`."""
    place = "" if kind == "model" else "datasets/"
    return (
        f"{name} asks for its licence to be accepted. 1. Accept it at https://huggingface.co/{place}{name} "
        f"2. Make a token at {TOKENS} 3. {pass_token}"
    )


def refusal(kind: str, name: str, error: Exception, *, pass_token: str, has_token: bool, copy: str) -> Exception:
    """The error to raise instead of `error`: PermissionError (401, 403), ValueError (404) or ConnectionError.

    Args:
        kind (`str`): "model" or "data set", or "repository" to write to.
        name (`str`): Its id.
        error (`Exception`): What huggingface_hub or datasets raised.
        pass_token (`str`): How the reader passes a token, as in "set HF_TOKEN".
        has_token (`bool`): Whether one was sent.
        copy (`str`): How to do without the hub, as in "pass the folder of a copy".
    """
    answer, names = status(error), {type(one).__name__ for one in chain(error)}
    if "GatedRepoError" in names:
        return PermissionError(licence(name, pass_token, kind))
    # without a token the hub says 401 of what is not there, and of what is private, to tell neither
    if answer == 404 or (answer in (401, None) and names & {"RepositoryNotFoundError", "DatasetNotFoundError"}):
        return ValueError(f"the hub has no {kind} {name!r}, or it is private: then {pass_token}")
    if answer in (401, 403) and not has_token:
        return PermissionError(
            f"the hub asks who you are ({answer}) before it gives {name}: make a token at {TOKENS} and {pass_token}"
        )
    if answer == 401:
        return PermissionError(
            "the hub refuses your token (401): it may be cut off, expired or revoked. Make one of the kind Read at "
            f"{TOKENS} and {pass_token}"
        )
    if answer == 403:
        return PermissionError(
            f"the hub refuses your token (403): it is valid, and may not read {name}. Accept the {kind}'s terms on its "
            f"page, or make a token with access to it (a fine-grained one has what you tick) at {TOKENS} and "
            f"{pass_token}"
        )
    if answer is not None:
        return ConnectionError(
            f"the hub answered {answer} instead of {name}: the network is fine, so try again in some minutes, or {copy}"
        )
    if kind == "data set" and isinstance(error, FileNotFoundError):
        return ValueError(f"{name} cannot be read as a data set: {error}")
    missing = "" if kind == "repository" else f" and {name} is not in this machine's cache"
    return ConnectionError(
        f"the hub is out of reach{missing} ({type(error).__name__}). Switch the network on (Kaggle: Settings > "
        f"Internet), or {copy}"
    )
