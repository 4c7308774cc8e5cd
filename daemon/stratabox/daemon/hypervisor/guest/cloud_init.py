"""What cloud-init did in a guest: waited for, and told.

It is asked of the files that every version writes: ``status.json`` while it works,
``result.json`` when it has ended. Both are the guest's word, and bounded.
"""

from __future__ import annotations

import asyncio
import json

from stratabox.daemon.hypervisor.guest import exec as guest_exec
from stratabox.daemon.hypervisor.guest.agent import GuestAgent
from stratabox.storage.model.errors import UnavailableError

_PAUSE = 1.0
_LONGEST_PAUSE = 5.0
_ASK_SECONDS = 60.0
_BYTES = 64 << 10
_WORDS = 600

# "none": it is not there, or was told to do nothing; "runs"; or its result, and what its log says
# of user data that it passed over, which older versions count as no error.
_ASK = """\
at=/run/cloud-init
if [ -e $at/disabled ] || ! command -v cloud-init >/dev/null; then echo none; exit; fi
if [ ! -e $at/result.json ]; then echo runs; exit; fi
echo ended
head -c 32768 $at/result.json
echo
grep -hE 'WARNING\\]: (Failed loading yaml|Unhandled non-multipart|Failed at merging in cloud)' \
    /var/log/cloud-init.log 2>/dev/null | tail -n 3 | head -c 2048
"""


async def settle(agent: GuestAgent) -> str:
    """Wait until cloud-init has ended, however long; "", or what it says went wrong.

    Its agent may be started again meanwhile, as by cloud-init itself.
    """
    pause = _PAUSE
    while True:
        try:
            result = await guest_exec.execute(agent, ["sh", "-c", _ASK], timeout=_ASK_SECONDS)
        except UnavailableError:
            await agent.wait_ready(_ASK_SECONDS)
            continue
        answer = result.stdout[:_BYTES].decode(errors="replace")
        word, _, rest = answer.partition("\n")
        if word != "runs":
            return "" if word == "none" else explain(rest)
        await asyncio.sleep(pause)
        pause = min(pause * 1.5, _LONGEST_PAUSE)


def explain(answer: str) -> str:
    """What a result says went wrong, in words; "": nothing.

    :param answer: result.json, and lines of the log behind it.
    """
    decoder = json.JSONDecoder()
    try:
        result, end = decoder.raw_decode(answer.lstrip())
        errors = result["v1"]["errors"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return "its result makes no sense"
    log = answer.lstrip()[end:].strip().splitlines()
    wrong = [str(each) for each in errors] if isinstance(errors, list) else [str(errors)]
    wrong += [line.partition("WARNING]: ")[2] for line in log]
    return " ".join("; ".join(dict.fromkeys(wrong)).split())[:_WORDS]
