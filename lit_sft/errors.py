"""Error messages: one line with a remedy where the user can mend the cause, never with a secret."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from typing_extensions import override


class UserError(ValueError):
    """An error that the user can mend: one line with what is wrong, where, and the remedy.

    The command line prints it without a traceback and exits with a code other than 0.
    """


class UsageError(UserError):
    """A command line or config that cannot be read as settings; the exit code is 2."""


@contextmanager
def located(where: str) -> Iterator[None]:
    """Adds the place, such as file and row, to the message of a `UserError` in the block.

    Args:
        where: The place, such as `train.jsonl line 3`.

    Raises:
        UserError: The block raised one.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


HIDDEN = "<hidden>"
"""Stands in the place of a secret."""
_SECRET_NAME = re.compile(
    r"(^|[_-])(token|secret|passw(or)?d|credentials?|(api|access|secret|private|auth)[_-]?key)$",
    re.IGNORECASE,
)
"""Names of environment variables and settings whose values are secrets; not `max_new_tokens`."""
_SPECIAL_TOKEN = re.compile(r"(pad|eos|bos|unk|sep|cls|mask|image|audio|video|stop|special)_token$")
"""Names of settings that only look like the name of a secret."""
_SECRET = re.compile(r"\bhf_[A-Za-z0-9]{16,}|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)")
"""A token of the Hugging Face hub, or `user:password` in `https://user:password@host`."""
_SHORTEST_SECRET = 8
"""Characters. Shorter values of environment variables stay: hiding them would garble texts."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REMEDIES = {
    **dict.fromkeys(
        _FULL, "free some space or choose another disk (trainer.default_root_dir, data.cache_dir)"
    ),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS),
        "see the permissions, or choose another place (trainer.default_root_dir, data.cache_dir)",
    ),
    **dict.fromkeys(
        (errno.EMFILE, errno.ENFILE),
        "raise the limit (`ulimit -n 65536`) or lower data.num_workers",
    ),
    **dict.fromkeys(
        (errno.EAGAIN, errno.ENOMEM),
        "lower data.num_workers, or raise the limits (`ulimit -u`, memory)",
    ),
    errno.EPIPE: "the program that read the output has ended",
}
_IN_A_WORKER = re.compile(
    r"Caught \w+ in DataLoader worker process \d+\.\nOriginal Traceback.*\n(?:[\w.]+: )", re.DOTALL
)
_WORKER_DIED = re.compile(
    r"DataLoader worker \(pid\(?s?\)? [\d, ]+\) (.*?)\.?( Details|$)", re.DOTALL
)
_OUT_OF_MEMORY = re.compile(
    r"out of memory|DefaultCPUAllocator: (can't|not enough memory)|CUBLAS_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
_ASKED_FOR = re.compile(r"[Tt]ried to allocate ([\d.]+ \w+)")
_OF_LIGHTNING = "MisconfigurationException"
"""Lightning's error for settings that do not fit. It says which; Lightning is not imported here."""
_LAST_ERROR = re.compile(r"Last error:\s*(.+)")
_LOST_RANK = re.compile(
    r"gloo|NCCL|Connection (closed|reset) by peer|\bTCPStore\b|recvValue|sendBytes", re.IGNORECASE
)


def redact(text: str) -> str:
    """Hides the values of secret environment variables, hub tokens and passwords in addresses."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and _SECRET_NAME.search(name):
            text = text.replace(value, HIDDEN)
    return _SECRET.sub(HIDDEN, text)


def redact_settings(settings: Any, name: str = "") -> Any:
    """Redacts a tree of settings, where the name of a setting can tell a secret, too."""
    if isinstance(settings, Mapping):
        return {key: redact_settings(value, str(key)) for key, value in settings.items()}
    if isinstance(settings, list):
        return [redact_settings(item, name) for item in settings]
    if not isinstance(settings, str):
        return settings
    is_secret = _SECRET_NAME.search(name) and not _SPECIAL_TOKEN.search(name)
    return HIDDEN if settings and is_secret else redact(settings)


def redact_yaml(text: str) -> str:
    """Redacts a YAML file of settings; a file without secrets keeps its exact text."""
    settings = yaml.safe_load(text)
    hidden = redact_settings(settings)
    return text if hidden == settings else yaml.safe_dump(hidden, sort_keys=False)


def refuse_hidden(settings: Mapping[str, Any]) -> None:
    """Refuses settings read from a file in which a secret was hidden.

    Args:
        settings: Values by dotted key.

    Raises:
        UserError: A value holds `HIDDEN`.
    """
    for key, value in settings.items():
        if not isinstance(value, Mapping) and HIDDEN in str(value):
            raise UserError(f"{key} held a secret, which config.yaml does not keep: give it again")


class RedactingFormatter(logging.Formatter):
    """Formats log lines without secrets."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host ran out of memory."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None
    )


def is_lost_rank(error: BaseException) -> bool:
    """Whether the error is only the consequence of another rank's end."""
    return isinstance(error, torch.distributed.DistError) or (
        type(error) is RuntimeError and _LOST_RANK.search(str(error)) is not None
    )


def asked_for(error: BaseException) -> str:
    """Returns how much memory could not be allocated, in words."""
    match = _ASKED_FOR.search(str(error))
    if match is None:
        return "some more"
    number, unit = match[1].split()
    return f"{int(number) / 2**30:.2f} GiB more" if unit == "bytes" else f"{match[1]} more"


def in_one_line(error: BaseException) -> str | None:
    """Describes an error in one line with a remedy; None if it is unknown and needs a traceback."""
    text = _IN_A_WORKER.sub("", str(error))
    if isinstance(error, UserError) or type(error).__name__ == _OF_LIGHTNING:
        return " ".join(text.split())
    if isinstance(error, ValueError) and isinstance(error.__cause__, UserError):
        # The parser wraps errors from the options of a group that may be null.
        return in_one_line(error.__cause__)
    if match := _WORKER_DIED.search(text):
        return _of_a_worker(match[1])
    if is_out_of_memory(error):
        return (
            f"out of memory: {asked_for(error)} could not be had"
            f" ({' '.join(text.split())[:200] or 'host memory'})"
        )
    if is_lost_rank(error):
        return _of_a_lost_rank(text)
    return _of_the_system(error, text)


def _of_a_worker(fate: str) -> str:
    reason = "memory probably ran out" if "Killed" in fate or "exited" in fate else "see above"
    return f"a process that builds batches died ({fate}): {reason}; lower data.num_workers"


def _of_a_lost_rank(text: str) -> str:
    reason = text.splitlines()[0][:200]
    # NCCL's own reason stands further down. A wrong NCCL setting is told there.
    cause = _LAST_ERROR.search(text)
    if cause is not None:
        reason = f"{reason}; {cause[1][:200]}"
    return f"the connection to another rank broke, which was killed or has failed ({reason})"


def _of_the_system(error: BaseException, text: str) -> str | None:
    """Describes an error of the operating system; None for any other error."""
    if isinstance(error, OSError) and error.errno is not None:
        return _with_remedy(error)
    # A library may fail again while it handles a full disk.
    if isinstance(error.__context__, OSError) and error.__context__.errno in _FULL:
        return _with_remedy(error.__context__)
    # A library that writes without Python raises no OSError.
    if "No space left on device" in text:
        return f"{' '.join(text.split())[:200]}; {_REMEDIES[errno.ENOSPC]}"
    return None


def _with_remedy(error: OSError) -> str:
    """Describes an error of the operating system: files, reason, place in our code, remedy."""
    assert error.errno is not None
    line = str(error.strerror)
    files = [str(name) for name in (error.filename, error.filename2) if name is not None]
    if files:
        line = f"{' -> '.join(files)}: {line}"
    # The innermost function of ours says what was being written or read.
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if f"{os.sep}lit_sft{os.sep}" in frame.filename:
            line = f"{line} ({Path(frame.filename).name}, {frame.name})"
            break
    if error.errno in _REMEDIES:
        line = f"{line}; {_REMEDIES[error.errno]}"
    return line


_reported: BaseException | None = None
"""The last error that was reported, here or by another rank."""


def report_error(error: BaseException, rank: int = 0, advice: str = "") -> None:
    """Prints an error on stderr, in one line. An unknown error gets its traceback above the line.

    Args:
        error: The error. It is printed once, even if several callers report it or its consequences.
        rank: The rank that raised it.
        advice: A remedy that the caller knows.
    """
    global _reported
    cause: BaseException | None = error
    while cause is not None:
        if cause is _reported:
            return
        cause = cause.__cause__ or cause.__context__
    _reported = error
    line = in_one_line(error)
    if line is None:
        print(redact("".join(traceback.format_exception(error))), file=sys.stderr, end="")
        line = (
            f"{type(error).__name__}: {' '.join(str(error).split())} (not foreseen: the traceback"
            " is above)"
        )
    if rank:
        line = f"rank {rank}: {line}"
    if advice:
        line = f"{line}; {advice}"
    print(f"error: {redact(line)}", file=sys.stderr, flush=True)


def keep_silent(error: BaseException) -> None:
    """Marks an error as reported, because another rank reports it."""
    global _reported
    _reported = error


def exit_with_error(error: Exception) -> NoReturn:
    """Reports an error and ends the program with its exit code (see `exit_code`)."""
    report_error(error)
    if isinstance(error, BrokenPipeError):
        # Otherwise the interpreter would fail again when it flushes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(exit_code(error))


def exit_code(error: Exception) -> int:
    """Returns the exit code of an error: 2 for a wrong command line or config, 1 for what the user
    can mend otherwise, 3 for what is not foreseen.
    """
    if isinstance(error, UsageError):
        return 2
    return 3 if in_one_line(error) is None else 1
