"""Processes that start in milliseconds: copies, by ``fork``, of a process that has imported everything once.

A test process starts a template (this module, run as a program), which imports PyTorch, DeepSpeed, transformers and
this package, and from then on forks itself for every process that is asked for. A forked process has the environment,
working directory, import path and output of the process that asked for it.

A fork copies one thread and every lock. The template therefore runs nothing but imports: no parallel region, no process
group, no second thread. A package that starts a thread when it is imported is left to the processes that need it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import os
import pickle
import runpy
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .timeouts import allowed

ROOT = Path(__file__).resolve().parents[1]
START_S = 240  # until the template has imported everything, on a cold disk
PR_SET_PDEATHSIG = 1

# What ranks of the tests import; what cannot be imported is left out.
PRELOADED = (
    "apollo_dist",
    "apollo_dist.checkpoint",
    "apollo_dist.pretrain",
    "apollo_dist.preflight",
    "pytest",
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "deepspeed",
    "transformers.models.llama.modeling_llama",
    # DeepSpeed imports it when it first looks at an optimizer, and torch.compile, which it calls, takes 1 to 2 seconds.
    "deepspeed.runtime.zero.muon.original_muon",
    "torchao.prototype.quantized_training",
)


class Child:
    """A process that a template has forked; used as ``subprocess.Popen`` is."""

    def __init__(self, status: int) -> None:
        self._status = status
        self.returncode: int | None = None
        self.pid = self._read(allowed(START_S))
        if self.pid is None:
            raise AssertionError("the template of the ranks did not start a process; its error is above")

    def _read(self, timeout: float | None) -> Any:
        """The next number that the template sends; None if it sends none in time.

        Raises:
            AssertionError: if the template has died.
        """
        with selectors.DefaultSelector() as selector:
            selector.register(self._status, selectors.EVENT_READ)
            if not selector.select(timeout):
                return None
        data = os.read(self._status, 8)
        if len(data) < 8:
            raise AssertionError("the template of the ranks has died; its error is above")
        return struct.unpack("q", data)[0]

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, negative after a signal.

        Raises:
            subprocess.TimeoutExpired: if the process has not ended after ``timeout`` seconds.
        """
        if self.returncode is None:
            self.returncode = self._read(timeout)
            if self.returncode is None:
                raise subprocess.TimeoutExpired(f"forked process {self.pid}", timeout or 0)
            os.close(self._status)
        return self.returncode

    def poll(self) -> int | None:
        """The exit status; None while the process runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal unless the process has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """End the process at once."""
        self.send_signal(signal.SIGKILL)


class Template:
    """A process that forks itself on request. It ends, with all that it has forked, when this process ends.

    Args:
        hash_seed: Python's seed for the hashes of strings, in this template and in all that it forks.
        preloaded: the modules that it imports.
    """

    def __init__(self, hash_seed: int, preloaded: Sequence[str] = PRELOADED) -> None:
        self._control, theirs = socket.socketpair()
        environment = {
            **os.environ,
            "PYTHONHASHSEED": str(hash_seed),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "OMP_NUM_THREADS": "1",
            # Else DeepSpeed's import of torch._inductor starts compiler processes and a thread (CUDA builds of torch).
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        self._owner = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno()), *preloaded],
            cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()],
        )  # fmt: skip
        theirs.close()

    def alive(self) -> bool:
        """Whether it can be asked for processes."""
        return self._owner == os.getpid() and self._process.poll() is None

    def fork(
        self, fn: Callable[..., Any], *args: Any, env: dict[str, str] | None = None, cwd: str | Path | None = None,
        stdout: int = 1, stderr: int = 2,
    ) -> Child:  # fmt: skip
        """Run ``fn(*args)`` in a process of its own, whose exit status is 0 unless ``fn`` raises.

        Args:
            fn: a function that can be pickled, as its arguments.
            env: the whole environment, as for ``subprocess.Popen``; this process's if it is None.
            cwd: the working directory; this process's if it is None.
            stdout, stderr: file descriptors that the process writes to.
        """
        read, write = os.pipe()
        try:
            with tempfile.TemporaryFile() as job:
                setting = {"env": dict(env or os.environ), "cwd": str(cwd or os.getcwd()), "path": list(sys.path)}
                pickle.dump(setting, job)
                pickle.dump((fn, args), job)
                job.seek(0)
                sys.stdout.flush()
                sys.stderr.flush()
                socket.send_fds(self._control, [b"f"], [job.fileno(), write, stdout, stderr])
        except OSError as error:
            os.close(read)
            raise AssertionError("the template of the ranks has died; its error is above") from error
        finally:
            os.close(write)
        return Child(read)


def run_module(module: str, arguments: list[str]) -> None:
    """What ``python -m module arguments`` does; to be forked."""
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def run_interpreter(*words: str) -> None:
    """What ``python *words`` does, words being ``-m MODULE``, ``-c CODE`` or a file, and arguments; to be forked."""
    # What is defined there is found by its module's name, as pickle and dataclasses look for it.
    if words[0] == "-m":
        run_module(words[1], list(words[2:]))
        return
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if words[0] == "-c":
        sys.argv, code = ["-c", *words[2:]], compile(words[1], "<string>", "exec")
    else:
        sys.argv, code = list(words), compile(Path(words[0]).read_text(), words[0], "exec")
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        main.__dict__["__file__"] = words[0]
    exec(code, main.__dict__)


_templates: dict[int, Template] = {}


def template(number: int) -> Template:
    """One of this process's templates, started if need be.

    Their hashes of strings differ, as those of launched processes do: a rank that goes through a set in an order of its
    own is then seen in tests as well.
    """
    if number not in _templates or not _templates[number].alive():
        _templates[number] = Template(hash_seed=number + 1)
    return _templates[number]


def preload(names: Sequence[str]) -> str | None:
    """Import modules; the name of the first one that starts a thread, which no fork would have, if one does."""
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # whoever needs it meets the error itself
            if not isinstance(error, ImportError):
                print(f"tests.template: {name} is not preloaded: {error}", file=sys.stderr)
        if _threads() > 1:
            return name
    # What is never collected is not written to either, and stays shared between all copies.
    gc.collect()
    gc.freeze()
    return None


def _threads() -> int:
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.exists() else threading.active_count()


def serve(control: socket.socket) -> None:
    """Fork for every request until the test process ends; then end all that was forked."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    handlers = {
        signal.SIGCHLD: signal.signal(signal.SIGCHLD, lambda *_: None),  # it wakes the loop
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),  # the test process decides
    }
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    children: dict[int, int] = {}
    selector = selectors.DefaultSelector()
    selector.register(control, selectors.EVENT_READ)
    selector.register(read, selectors.EVENT_READ)
    while True:
        ready = [key.fileobj for key, _ in selector.select()]
        if read in ready:
            os.read(read, 4096)
            _reap(children)
        if control in ready:
            data, fds, _, _ = socket.recv_fds(control, 1, 4)
            if not data:
                break
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                for number, handler in handlers.items():
                    signal.signal(number, handler)
                selector.close()
                for fd in (control.detach(), read, write, fds[1], *children.values()):
                    os.close(fd)
                _child(fds[0], fds[2], fds[3])
            for fd in (fds[0], fds[2], fds[3]):
                os.close(fd)
            children[pid] = fds[1]
            _tell(fds[1], pid)
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _reap(children: dict[int, int]) -> None:
    """Send the exit status of every process that has ended."""
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        if pid in children:
            _tell(children[pid], os.waitstatus_to_exitcode(status))
            os.close(children.pop(pid))


def _tell(status: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody waits any more
        os.write(status, struct.pack("q", number))


def _child(job: int, stdout: int, stderr: int) -> None:
    """Do one job in a process that was just forked, and end the process."""
    code = 1
    try:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        os.close(stdout)
        os.close(stderr)
        with os.fdopen(job, "rb") as file:
            setting = pickle.load(file)
            os.environ.clear()
            os.environ.update(setting["env"])
            os.chdir(setting["cwd"])
            sys.path[:] = setting["path"]
            fn, args = pickle.load(file)
        fn(*args)
        code = 0
    except SystemExit as end:
        code = _code(end)
    except BaseException:
        traceback.print_exc()
    # As Python itself ends, without taking down what other threads of C++ may still use.
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _code(end: SystemExit) -> int:
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    print(end.code, file=sys.stderr)
    return 1


def main(fd: str, *names: str) -> None:
    """Import ``names`` and serve the socket ``fd``; begin anew without a module that starts a thread."""
    culprit = preload(names)
    if culprit is not None:
        print(f"tests.template: {culprit} starts a thread and is not preloaded", file=sys.stderr, flush=True)
        kept = [name for name in names if name != culprit]
        os.execv(sys.executable, [sys.executable, "-m", "tests.template", fd, *kept])
    serve(socket.socket(fileno=int(fd)))
    os._exit(0)  # as its copies end: Triton's library would list what its functions leave behind


if __name__ == "__main__":
    main(*sys.argv[1:])
