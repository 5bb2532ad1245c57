"""``python -m apollo_dist.pretrain``, ``torchrun ... -m apollo_dist.pretrain``, ``deepspeed ... --module ...``."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path

from apollo_dist.pretrain.distributed import Ranks, SetupError, process_group
from apollo_dist.pretrain.settings import Settings, help_text, load_settings
from apollo_dist.pretrain.stop import Requests, listening
from apollo_dist.pretrain.train import train
from apollo_dist.pretrain.watchdog import SLOW, Watchdog

LAST_WORDS_SECONDS = 30.0  # how long a rank that ends with an error waits for the others to say it too


def main(arguments: Sequence[str], heard: Requests | None = None) -> int:
    """Train as the arguments say; ``heard`` takes signals already, else this listens to them until it returns.

    The exit code: 0 after a finished run, 2 after an error that all ranks agreed on, 85 after a run that stopped
    because it was asked to. (A rank that waits too long ends with 86, see ``watchdog``.)
    """
    if "--help" in arguments or "-h" in arguments:
        print(help_text())
        return 0
    # A rank whose arguments are wrong must join the group all the same, or the others would wait for it.
    settings: Settings | None = None
    problem = ""
    try:
        settings = load_settings(arguments)
    except (ValueError, OSError) as error:
        problem = str(error)

    def check() -> Settings:
        if settings is None:
            raise ValueError(problem)
        return settings

    limit, folder = (settings.config.step_timeout, settings.config.output_folder) if settings else (0.0, Path())
    watchdog = Watchdog(limit, os.environ.get("RANK", "0"), folder)
    try:
        with (
            listening() if heard is None else contextlib.nullcontext(heard) as requests,
            watchdog,
            process_group(settings.config.timeout_minutes if settings else 10.0) as ranks,
        ):
            _configure_logging(ranks)
            try:
                return train(ranks.together(check), ranks, requests, watchdog)
            except SetupError as error:
                watchdog.mark("the other ranks' last words", SLOW)
                return _end_together(error, ranks)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _end_together(error: SetupError, ranks: Ranks) -> int:
    prefix = f"[rank {ranks.rank}] " if ranks.world > 1 else ""
    print(f"{prefix}error: {error}", file=sys.stderr, flush=True)
    # Launchers kill the other ranks as soon as one ends, so all must have printed by then; unless one got lost.
    waiting = threading.Thread(target=_meet, args=(ranks,), daemon=True)
    waiting.start()
    waiting.join(LAST_WORDS_SECONDS)
    if waiting.is_alive():
        raise SystemExit(2)  # past the end of the process group, which would wait as well
    return 2


def _meet(ranks: Ranks) -> None:
    with contextlib.suppress(RuntimeError):
        ranks.barrier()


def _configure_logging(ranks: Ranks) -> None:
    level = logging.INFO if ranks.first else logging.ERROR
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("apollo_dist").setLevel(level)


def _run(heard: Requests) -> int:
    """`main`, and what Python would do about its exceptions."""
    try:
        return main(sys.argv[1:], heard)
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else 1
    except KeyboardInterrupt:
        return 130
    except Exception:
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    # To the end: a launcher sends the others SIGTERM when the first rank is gone, and they have their own exit code.
    signals = listening()
    code = _run(signals.__enter__())
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is written and closed by now, so leave without the interpreter's own shutdown. DeepSpeed keeps process
    # groups alive, and with them gloo's worker threads: one of those that wants the GIL in a shutdown aborts the
    # process (SIGABRT after the last line, seen in 1 of 10 runs under ZeRO-0). And a rank that failed must be gone at
    # once, for its launcher to end the others; CUDA's teardown may wait for kernels that wait for those others.
    os._exit(code)
