"""What QEMU has run, by its own trace, beside what it was to run."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping

_RAN = re.compile(r"handle_qmp_command mon (\S+) req: (.*)")
"""QEMU's event of each command that it takes from a monitor (monitor/trace-events)."""
_OTHERS = ("stop", "cont")
"""Of the monitor that is not refault's."""
_OF_A_CLIENT = re.compile(r"^refault-[0-9a-f]+-\d+-")
"""How refault tells descriptors apart that clients call the same (refault.qmp.fdnames)."""
_OWN_ONCE = re.compile(r"refault-kept-|^remove-fd ")
"""What has QEMU hold a connection or let go of it, or of a set whose clients have left (qmp/fdsets.py)."""
_MOST_TOLD = 10


class Said:
    """Commands of one client, each by its id and by what it is in the trace; those too that may not have
    reached QEMU."""

    def __init__(self) -> None:
        self._by_id: dict[str, str] = {}
        self._answered: set[str] = set()

    def command(self, name: str, spelling: str, **arguments: object) -> bytes:
        """One that is about to be said, `spelling` its id."""
        command = {"execute": name, **({"arguments": arguments} if arguments else {}), "id": spelling}
        self._by_id[spelling] = _known_by(command)
        return json.dumps(command).encode()

    def answered(self, spelling: str) -> None:
        """Its answer has come, so QEMU has run it."""
        self._answered.add(spelling)

    @property
    def least(self) -> Iterable[str]:
        """What QEMU has run."""
        return [known for spelling, known in self._by_id.items() if spelling in self._answered]

    @property
    def most(self) -> Iterable[str]:
        """What it may have run."""
        return self._by_id.values()


def miscounted(trace: str, clients: Iterable[Said]) -> tuple[int, list[str]]:
    """How many commands QEMU ran that came through refault, and which of them not as often as they were said.

    Each of a client's once, and no other but refault's own: questions, and what has QEMU hold or let go of
    something, once each. The connection was negotiated once.
    """
    least: Counter[str] = Counter()
    most: Counter[str] = Counter(['qmp_capabilities {"enable": ["oob"]}'])
    for client in clients:
        least.update(client.least)
        most.update(client.most)
    ran = _ran(trace)
    wrong = []
    for known in dict.fromkeys((*least, *ran)):
        count, own = ran[known], 0
        if known not in most and known.startswith("query-"):
            own = count
        elif known not in most and _OWN_ONCE.search(known):
            own = 1
        fewest, highest = least[known], most[known] + own
        if not fewest <= count <= highest:
            wrong.append(f"QEMU ran {known} {count} times, and it was said {fewest} to {highest} times")
    return ran.total(), wrong[:_MOST_TOLD]


def _ran(trace: str) -> Counter[str]:
    """Those of refault's monitor."""
    monitors: dict[str, Counter[str]] = {}
    for monitor, command in _RAN.findall(trace):
        monitors.setdefault(monitor, Counter())[_known_by(json.loads(command))] += 1
    ours = [ran for ran in monitors.values() if not any(other in ran for other in _OTHERS)]
    return sum(ours, Counter())


def _known_by(command: Mapping[str, object]) -> str:
    """All of it but the id, which refault changes."""
    arguments = command.get("arguments")
    if not isinstance(arguments, dict) or not arguments:
        return str(command.get("execute", command.get("exec-oob")))
    if isinstance(name := arguments.get("fdname"), str):
        arguments = {**arguments, "fdname": _OF_A_CLIENT.sub("", name)}
    return f"{command['execute']} {json.dumps(arguments, sort_keys=True)}"
