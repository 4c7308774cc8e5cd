"""How errors are told: on stderr, with a hint for people or as JSON for programs; exit codes."""

from __future__ import annotations

import json

import click

from stratabox.client import access_errors, errors
from stratabox.client.cli.output import printable
from stratabox.client.errors import StrataboxError

FAILED = 1
USAGE = 2
NOT_FOUND = 3
DENIED = 4
UNREACHABLE = 5
TIMED_OUT = 124
INTERRUPTED = 130

_CODES: tuple[tuple[type[StrataboxError], int], ...] = (
    (errors.NotFoundError, NOT_FOUND),
    (errors.DeniedError, DENIED),
    (errors.AlreadyExistsError, DENIED),
    (errors.InvalidArgumentError, USAGE),
    (access_errors.UnauthenticatedError, DENIED),
    (access_errors.ForbiddenError, DENIED),
    (errors.DaemonUnavailableError, UNREACHABLE),
    (errors.DaemonEndingError, UNREACHABLE),
    (errors.DeadlineExceededError, TIMED_OUT),
)

_HINTS = {
    "SANDBOX_NOT_FOUND": "stratabox sandbox list --all shows what there is",
    "SNAPSHOT_NOT_FOUND": "stratabox sandbox snapshot list shows what there is",
    "IMAGE_NOT_FOUND": "stratabox image list shows what there is; "
    "stratabox image build tiny makes one within a minute",
    "IMAGE_ALREADY_EXISTS": "give it another name with --name, or delete the old one",
    "INVALID_IMAGE": "stratabox image import --format says how the file is read",
    "NO_CLOUD_INIT": "stratabox image import --cloud-init takes a cloud image as one",
    "CLOUD_INIT_FAILED": "with --no-wait it stays, to look into; stratabox sandbox exec",
    "INVALID_ARCHIVE": "export it again; stratabox image import takes disks of others",
    "MISSING_BASE": "import what it was exported since first, or export it without --since",
    "RESUME_MISMATCH": "remove FILE.part and begin again",
    "IS_A_DIRECTORY": "-r copies and removes directories with all that is in them",
    "DIRECTORY_NOT_EMPTY": "-r removes it with all that is in it",
    "GUEST_NO_SPACE": "stratabox sandbox exec SANDBOX df shows what is full",
    "VOLUME_NOT_FOUND": "stratabox volume list shows what there is",
    "VOLUME_SNAPSHOT_NOT_FOUND": "stratabox volume snapshot list shows what there is",
    "VOLUME_IN_USE": "stratabox volume get VOLUME tells who has it",
    "VOLUME_BUSY": "end what uses it in the guest, or pull it out with --force",
    "AMBIGUOUS_NAME": "use an id, or more of it",
    "IMAGE_IN_USE": "delete what needs it first",
    "SNAPSHOT_NOT_READY": "stratabox sandbox snapshot get SNAPSHOT tells its state",
    "AGENT_UNAVAILABLE": "the guest may only be slow: try a longer --ready-timeout",
    "PROBE_FAILED": "with --no-wait it stays, to look into; a longer --ready-timeout may do",
    "CONSOLE_NOT_READ": "a guest that is paused, or has halted, reads nothing",
    "LIBVIRT_UNAVAILABLE": "stratabox doctor tells what is missing",
    "LIBVIRT_REFUSED": "stratabox doctor examines the host; libvirtd's log says more",
    "NETWORK_UNAVAILABLE": "stratabox doctor tells what is missing, and how to mend it",
    "TOOL_MISSING": "stratabox doctor tells what is missing, and how to mend it",
    "KVM_UNUSABLE": "stratabox doctor tells why",
    "QEMU_FAILED": "the daemon's log says more; stratabox doctor examines the host",
    "ADMISSION_REFUSED": "stratabox host shows what there is, and sandbox list who has it",
    "NO_SPACE": "delete snapshots, sandboxes or images that are not needed",
    "IDEMPOTENCY_MISMATCH": "use another key for another request",
    "DAEMON_UNAVAILABLE": "or with: systemctl start strataboxd; "
    "--address or STRATABOX_ADDRESS names another daemon",
    "INVALID_ADDRESS": "for example unix:///run/stratabox/api.sock or http://127.0.0.1:7777",
    "NO_KEY": "stratabox key create, on the daemon's host, makes one; STRATABOX_API_KEY has it",
    "INVALID_KEY": "STRATABOX_API_KEY has the key that is shown",
    "KEY_EXPIRED": "stratabox key create, on the daemon's host, makes another",
    "FORBIDDEN": "stratabox key create --role, on the daemon's host, makes one that may",
    "UNIMPLEMENTED": "the daemon is older than this client: bring both to the same version",
    "INTERNAL": "this is a bug; the daemon's log says more",
}


def exit_code(error: StrataboxError) -> int:
    """Choose the exit code for an error."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), FAILED)


def hint(error: StrataboxError) -> str | None:
    """Say what to do next, where there is something to say."""
    if isinstance(error, errors.SnapshotFailedError) and error.snapshot_id:
        return f"stratabox sandbox snapshot get {error.snapshot_id} tells more; delete it when done"
    if isinstance(error, errors.DaemonUnavailableError) and "permission" in error.message:
        return "become a member of the socket's group, or use sudo"
    return _HINTS.get(error.reason)


def report(error: StrataboxError, *, as_json: bool) -> int:
    """Tell an error on stderr and return the exit code."""
    _tell(error.message, hint(error), error.reason, error.metadata, as_json=as_json)
    return exit_code(error)


def report_usage(error: click.UsageError, *, as_json: bool) -> int:
    """Tell that the command line is wrong and return the exit code."""
    nothing_said = getattr(click.exceptions, "NoArgsIsHelpError", None)
    if nothing_said is not None and isinstance(error, nothing_said):
        error.show()
        return USAGE
    help_line = f"{error.ctx.command_path} --help" if error.ctx is not None else None
    _tell(error.format_message(), help_line, "USAGE", {}, as_json=as_json)
    return USAGE


def report_text(message: str, *, as_json: bool) -> int:
    """Tell of a failure of this side's own and return the exit code."""
    _tell(message, None, "FAILED", {}, as_json=as_json)
    return FAILED


def _tell(
    message: str, advice: str | None, reason: str, metadata: dict[str, str], *, as_json: bool
) -> None:
    if as_json:
        body = {"reason": reason, "message": message, "metadata": metadata}
        click.echo(json.dumps({"error": body}), err=True)
        return
    click.echo(f"error: {printable(message)}", err=True)
    for key in ("needed_by", "candidates", "ids"):
        if key in metadata:
            click.echo(f"  {key.replace('_', ' ')}: {printable(metadata[key])}", err=True)
    if advice:
        click.echo(f"hint: {printable(advice)}", err=True)
