"""A refault that recovers and replays nothing, to stand beside one that does.

python -m refault.lab.without_replay run ...
"""

from __future__ import annotations

from typing import Any

from refault.channel.relay import Relay
from refault.cli.main import main

_attach = Relay.attach


def _without_replay(relay: Relay, local: int, far: int, **how: Any) -> None:
    _attach(relay, local, far, **{**how, "may_replay": False})


if __name__ == "__main__":
    Relay.attach = _without_replay  # type: ignore[method-assign, assignment]
    raise SystemExit(main())
