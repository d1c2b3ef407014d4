"""Start a script on several processes: torchrun, with restarts, signals passed on, and one sentence for what went wrong.

    python scripts/launch.py SCRIPT OPTIONS...        NPROC, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, MAX_RESTARTS: setup.sh

A process that was killed, or that lost another one, is started again with all others, at most MAX_RESTARTS times: a training
goes on from its last checkpoint.  A mistake of the user, a fault of the program and a request to stop end everything.
"""

import logging
import os
import signal
import sys
import uuid
import warnings
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started by its path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, get_args_parser

from utils.signals import EXIT_CODES, LAUNCHED, RETRY

USER_ERROR = 2


def words(variables: dict[str, str], script: list[str]) -> list[str]:
    """torchrun's command line: on one node a free port of its own, on several a meeting place that node 0 keeps."""
    nodes = variables.get("NNODES", "1")
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--rdzv-id", str(uuid.uuid4())]
    if nodes != "1":
        place = f"{variables.get('MASTER_ADDR', '127.0.0.1')}:{variables.get('MASTER_PORT', '29500')}"
        host = "true" if variables.get("NODE_RANK", "0") == "0" else "false"
        meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", place, "--rdzv-id", "iar2",
                   "--rdzv-conf", f"is_host={host},join_timeout=600"]
    return ["--nnodes", nodes, "--nproc-per-node", variables.get("NPROC", "1"), *meeting, *script]


def children() -> list[int]:
    """Process ids of the processes that this one has started."""
    return [int(child) for task in Path("/proc/self/task").iterdir() for child in (task / "children").read_text().split()]


class Signals:
    """Passes signals on to the processes, which decide when to end, and remembers that one came."""

    def __init__(self) -> None:
        self.exit_code = 0
        for each in EXIT_CODES:
            signal.signal(each, self._pass_on)

    def _pass_on(self, signum: int, frame: FrameType | None) -> None:
        self.exit_code = EXIT_CODES[signal.Signals(signum)]
        for child in children():
            os.kill(child, signum)


def describe(rank: int, failure: ProcessFailure, size: str) -> str:
    """What happened to the process that failed first, in one sentence."""
    who = f"process {rank} of {size}"
    if failure.exitcode < 0:
        return f"{who} was killed by {signal.Signals(-failure.exitcode).name}"
    if failure.exitcode == RETRY:
        return f"{who} lost the connection to another one"
    if failure.exitcode == USER_ERROR:
        return f"{failure.message.rstrip('.')} ({who})."
    return f"{who} failed with exit code {failure.exitcode}: its own message is above"


def blame(failure: ProcessFailure) -> tuple[int, int]:
    """Sorts the cause before its consequences: killed, mistaken or failed processes, then those that lost another one."""
    return int(failure.exitcode == RETRY), failure.timestamp


def run_once(script: list[str], signals: Signals) -> tuple[int, str, bool]:
    """Start all processes and wait: (exit code, sentence or "", whether starting again may help)."""
    config, command, arguments = config_from_args(get_args_parser().parse_args(words(dict(os.environ), script)))
    if hasattr(config, "signals_to_handle"):
        config.signals_to_handle = "SIGHUP"  # the others are ours
    try:
        elastic_launch(config=config, entrypoint=command)(*arguments)
    except ChildFailedError as error:
        if signals.exit_code:
            return signals.exit_code, "", False
        rank, failure = min(error.failures.items(), key=lambda item: blame(item[1]))
        if failure.exitcode in EXIT_CODES.values():  # a process was asked by itself, and the others agreed
            return failure.exitcode, "", False
        size = str(config.nproc_per_node * config.max_nodes)
        again = failure.exitcode < 0 or failure.exitcode == RETRY
        return abs(failure.exitcode) if failure.exitcode > 0 else 1, describe(rank, failure, size), again
    except (RendezvousError, OSError) as error:
        place = os.environ.get("MASTER_ADDR", "this machine")
        return 1, f"the nodes did not meet at {place} ({' '.join(str(error).split())[:200]})", False
    return 0, "", False


def main() -> None:
    """Start the script given on the command line until it ends for good."""
    if len(sys.argv) < 2:
        sys.exit("error: name the script to start, for example autoregressive/train/train_c2i.py.")
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)  # torchrun's own account of failures
    os.environ |= {LAUNCHED: "1", "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGHUP"}
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // int(os.environ.get("NPROC", "1")), 1)))
    signals, left = Signals(), int(os.environ.get("MAX_RESTARTS", "3"))
    while True:
        code, sentence, again = run_once(sys.argv[1:], signals)
        if not (again and left) or signals.exit_code:
            break
        left -= 1
        sys.stderr.write(f"{sentence}: starting all processes again ({left} more times at most)\n")
    if sentence:
        sys.stderr.write(f"error: {sentence}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
