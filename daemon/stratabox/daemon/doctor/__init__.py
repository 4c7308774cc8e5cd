"""``strataboxd doctor``: says what this host can do, and how to mend what is missing.

The checks are in ``doctor_checks``; here they are run and shown. A check never changes the host,
never needs the daemon to run, and never raises: one that breaks is a finding of its own.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stratabox.daemon.config import Config
from stratabox.daemon.doctor import access, capacity, guests, host, kernel, libvirt, service
from stratabox.daemon.doctor.finding import Finding, Status

Check = Callable[[Config], Iterable[Finding]]

CHECKS: tuple[Check, ...] = (
    host.check_python,
    service.check_package,
    service.check_units,
    service.check_daemon,
    guests.check_qemu,
    guests.check_firmware,
    guests.check_accelerator,
    guests.check_kvm_device,
    capacity.check_confinement,
    kernel.check_control_groups,
    kernel.check_labels,
    host.check_tools,
    host.check_subuids,
    host.check_state_dir,
    capacity.check_memory,
    host.check_socket,
    access.check_keys,
    access.check_tls,
    host.check_uid_range,
    guests.check_memory_rights,
    guests.check_page_tracking,
    guests.check_network,
    libvirt.check_libvirt,
)


@dataclass(frozen=True)
class Report:
    """All findings, in the order in which they matter."""

    checks: Sequence[Finding]

    @property
    def ok(self) -> bool:
        """Nothing must be mended before the daemon can serve."""
        return all(finding.status is not Status.FAIL for finding in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """Give it as ``--json`` prints it."""
        return {"checks": [asdict(finding) for finding in self.checks], "ok": self.ok}

    def as_text(self) -> str:
        """Give it as a table for people."""
        width = max(len(finding.name) for finding in self.checks)
        indent = " " * (6 + width + 2)
        lines: list[str] = []
        for finding in self.checks:
            head = f"{finding.status:<4}  {finding.name:<{width}}  "
            lines += textwrap.wrap(
                finding.detail, width=100, initial_indent=head, subsequent_indent=indent
            ) or [head.rstrip()]
            if finding.remedy:
                lines.append(f"{indent}→ {finding.remedy}")
        failed = sum(finding.status is Status.FAIL for finding in self.checks)
        warned = sum(finding.status is Status.WARN for finding in self.checks)
        lines.append("")
        if failed:
            lines.append(f"{failed} to mend before strataboxd can serve, {warned} to know of.")
        else:
            lines.append(f"This host can run sandboxes; {warned or 'nothing'} to know of.")
        return "\n".join(lines)


def examine(config: Config) -> Report:
    """Run every check."""
    findings: list[Finding] = []
    for check in CHECKS:
        try:
            findings += check(config)
        except Exception as error:  # an odd host must not hide the other findings
            name = check.__name__.removeprefix("check_").replace("_", "-")
            detail = f"the check itself broke: {type(error).__name__}: {error}"
            findings.append(Finding(name, Status.WARN, detail))
    return Report(findings)
