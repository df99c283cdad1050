"""The warm server of a study: it imports once what stages need, and forks a process for each stage.

`pipelines.warm` starts it as `python -m pipelines.warm_server SOCKET ROOM` and asks it over this socket to bring stages up to
date. For each stage the server forks a guard, the guard forks DVC, and DVC forks the process of the stage: the same tree as
`pipelines.guard` starts, with the same commands in `ps`. Every process forks the next one before it does anything else, so a
stage finds the state of a fresh Python that has only imported its modules.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import json
import logging
import os
import re
import runpy
import select
import signal
import socket
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from pipelines import atomic_dvc, guard

MODULE_COMMAND = re.compile(r"python -m (pipelines\.stages\.\w+)((?: [\w.=@,:+/-]+)*)", re.ASCII)
"""The command of a stage that is a module of this project; it needs no shell."""
DVC_MODULES = (
    *("dvc.repo.artifacts", "dvc.repo.datasets", "dvc.repo.metrics", "dvc.repo.open_repo", "dvc.repo.params", "dvc.repo.plots"),
    *("dvc.repo.reproduce", "dvc.repo.stage", "dvc.stage.cache", "dvc.stage.run", "dvc.rwlock", "dvc.scm", "dvc.dirs"),
    *("dvc.cachemgr", "dvc.data_cloud", "dvc.utils.strictyaml", "dvc_data.hashfile.db.local", "dvc_data.hashfile.status"),
    *("dvc.repo.index", "dvc_data.hashfile._progress", "configobj", "fsspec.implementations.memory"),
    *("dulwich.index", "dulwich.ignore", "dulwich.worktree"),
)
"""Modules that DVC imports when it runs a stage, in addition to those of its command line."""
SPARED_THREADS = ("jemalloc_bg_thd",)
"""Names of threads that may be alive when this process forks: jemalloc, which comes with pyarrow, supports this."""
TASKS = "/proc/self/task"
GPUS = ("/dev/nvidia", "/dev/kfd")
BY_NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"
"""Makes torch look for GPUs without opening one, if a library asks for GPUs on import (PyTorch, CUDA semantics)."""
MOST_BYTES = 65536
"""The largest size of a request."""
DESCRIPTORS = 3
"""How many file descriptors come with a request: the guard's standard input, its output, and a pipe for its exit code."""
Request = tuple[dict[str, Any], list[int]]


class NotWarmError(Exception):
    """Forks of this process could behave differently from fresh processes."""


class Forked:
    """A fork of this process, with signals as in a fresh one, which runs `main` and ends."""

    def __init__(self, main: Callable[[], None]) -> None:
        numbers = {signal.SIGTERM, signal.SIGCHLD}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        self.pid = os.fork()
        if self.pid == 0:
            for number in numbers:
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if self.pid == 0:
            main()
            end()

    def wait(self) -> int:
        """Wait until the fork ends, and return its exit code; negative for a signal."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


class Origins:
    """During the import of which module each thread of this process was first seen, and which packages imported the module."""

    def __init__(self) -> None:
        self._found: dict[str, str] = {}
        self._importing: list[str] = []
        self._links = 0

    def of(self, tasks: Iterable[str]) -> str:
        """Say during which imports these threads were first seen; empty if during none."""
        where = dict.fromkeys(self._found[task] for task in tasks if self._found.get(task))
        return f" while {' and '.join(where)}" if where else ""

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch what is imported in this block. Afterwards, and so in every fork, Python imports as before."""
        importer: Any = import_module("_frozen_importlib")
        load = importer._load_unlocked

        def watched_load(spec: ModuleSpec) -> ModuleType:
            self._look()  # for threads that the importing module has started itself
            self._importing.append(spec.name)
            try:
                module: ModuleType = load(spec)
                return module
            finally:
                self._look()
                self._importing.pop()

        importer._load_unlocked = watched_load
        try:
            yield
        finally:
            importer._load_unlocked = load

    def _look(self) -> None:
        links = os.stat(TASKS).st_nlink  # one for each thread, and two more; this is quicker than to list the threads
        if links != self._links:
            self._links = links
            above = list(dict.fromkeys(name.partition(".")[0] for name in reversed(self._importing)))[1:]
            by = f" by {', '.join(above)}" if above else ""
            where = f"{self._importing[-1]} was imported{by}" if self._importing else ""
            for task in os.listdir(TASKS):
                self._found.setdefault(task, where)


@contextmanager
def without_accelerators() -> Iterator[None]:
    """Let torch say in this block that there is no accelerator, so that a library that asks on import opens none."""
    accelerator = import_module("torch").accelerator
    is_available = accelerator.is_available
    accelerator.is_available = lambda: False
    try:
        yield
    finally:
        accelerator.is_available = is_available


class Server:
    """Imports `modules`, and forks for each request until the other end of `connection` is closed."""

    def __init__(self, connection: socket.socket, modules: list[str]) -> None:
        self.connection = connection
        self.modules = modules
        self.environment = dict(os.environ)
        self.code = code_state()
        self.guards: set[int] = set()
        self.origins = Origins()

    def serve(self) -> None:
        """Serve each request once the module that it needs has been imported. Raises `NotWarmError`."""
        signal.signal(signal.SIGCHLD, lambda *_: self._reap())
        os.environ[BY_NVML] = "1"
        with self.origins.watched(), without_accelerators():
            import_module("dvc.cli").parse_args(["repro"])  # imports its commands
            for name in DVC_MODULES:
                import_module(name)
            import_module("dit.models").backbones()  # imports the networks, as every stage does that reads the parameters
        left, waiting = list(self.modules), list[Request]()
        while True:
            if left and not select.select([self.connection], [], [], 0)[0]:
                with self.origins.watched(), without_accelerators():
                    import_module(left.pop(0))
                gc.freeze()  # forks share the memory of objects that the collector does not visit again
            else:
                text, held, _, _ = socket.recv_fds(self.connection, MOST_BYTES, DESCRIPTORS)
                if not text:
                    return
                waiting.append((json.loads(text), held))
            for request in [each for each in waiting if each[0]["module"] not in left]:
                waiting.remove(request)
                self._fork_guard(*request)

    def _fork_guard(self, request: dict[str, Any], held: list[int]) -> None:
        self._check()
        self.guards.add(Forked(lambda: self._guard(request, *held)).pid)
        for descriptor in held:
            os.close(descriptor)

    def _check(self) -> None:
        """Raises `NotWarmError` if a fork could behave differently from a fresh process."""
        if code_state() != self.code:
            raise NotWarmError("the code of dit or pipelines has changed")
        if _threads():
            os.waitpid(_fork_that_ends(), 0)  # OpenBLAS ends its threads before a fork, and starts them when needed
        if threads := _threads():
            raise NotWarmError(f"a library has started threads{self.origins.of(threads)}: {', '.join(threads.values())}")
        if _has_used_a_gpu():
            raise NotWarmError("a library has opened a GPU")

    def _reap(self) -> None:
        """Wait for guards that have ended, so that the CPU time of their processes is counted."""
        self.guards.difference_update([pid for pid in tuple(self.guards) if _has_ended(pid)])

    def _guard(self, request: dict[str, Any], hold: int, output: int, status: int) -> NoReturn:
        """Do what `guard.py` does. The start and the exit code go to `status`, because the server may end before the guard."""
        os.setsid()
        self.connection.close()
        for descriptor, standard in ((hold, 0), (output, 1), (output, 2)):
            os.dup2(descriptor, standard)
        os.close(hold)
        os.close(output)
        settings = guard.settings(spare=True)
        command = [sys.executable, "-P", atomic_dvc.__file__, *request["arguments"]]
        name_process([sys.executable, "-P", guard.__file__, *settings, *command])
        os.write(status, b"begun\n")
        code = guard.watch(lambda: Forked(lambda: self._dvc(status, command, request["environment"])), *settings)
        os.write(status, f"{code}\n".encode())
        os._exit(0)

    def _dvc(self, status: int, command: list[str], environment: dict[str, str]) -> None:
        """Run DVC, which lets a process that was forked beforehand run the stage's command."""
        os.close(status)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        imported = {name: value for name, value in os.environ.items() if self.environment.get(name) != value}
        imported.pop(BY_NVML, None)
        os.environ.clear()
        os.environ.update({**self.environment, **environment})
        read, write = os.pipe()
        stage = Forked(lambda: _stage(read, write, imported))
        os.close(read)
        name_process(command)
        sys.argv = command[2:]
        atomic_dvc.install()
        run_by(stage, write, self.modules)
        end(import_module("dvc.cli").main(sys.argv[1:]))


def end(code: str | int | None = 0) -> NoReturn:
    """End this process like `sys.exit(code)`, but without the half second in which Python tears down all modules."""
    if isinstance(code, str):
        print(code, file=sys.stderr)
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as Python does, and as multiprocessing calls it
    _leave_out_ends_of_torch()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if isinstance(code, str) else code or 0)


def _leave_out_ends_of_torch() -> None:
    """Leave out what torch does at exit only for itself: it unregisters operators, and makes a table for a log that is off."""
    table = getattr(sys.modules.get("torch._dynamo.utils"), "dump_compile_times", None)
    if table and not logging.getLogger(table.__module__).isEnabledFor(logging.INFO):
        atexit.unregister(table)
    if unregister := getattr(sys.modules.get("torch.library"), "_del_library", None):
        for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
            if (alive := finalizer.peek()) and alive[1] is unregister:
                finalizer.atexit = False


def run_by(stage: Forked, channel: int, modules: list[str]) -> None:
    """Make DVC in this process run a command in `stage`, a process that waits for it, if `stage` has imported its module."""
    run: Any = import_module("dvc.stage.run")
    by_shell = run._run
    waiting = [stage]

    def by_fork(executable: str | None, command: str, **options: Any) -> None:
        found = MODULE_COMMAND.fullmatch(command)
        if not (waiting and found and found[1] in modules and os.path.samefile(options["cwd"], os.curdir)):
            by_shell(executable, command, **options)
            return
        request = {"module": found[1], "arguments": found[2].split(), "environment": options["env"]}
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as DVC does
        try:
            with suppress(BrokenPipeError), open(channel, "w") as file:  # if it was killed, its exit code says so
                file.write(json.dumps(request) + "\n")
            if code := waiting.pop().wait():
                raise run.StageCmdFailedError(command, code)
        finally:
            signal.signal(signal.SIGINT, before)

    run._run = by_fork


def _stage(read: int, write: int, imported: dict[str, str]) -> None:
    """Wait for a stage's command, and run it as `python -m` would. `imported` are environment variables that imports set."""
    os.close(write)
    name_process([sys.executable, "-m", "pipelines.stages"])
    with open(read) as file:
        text = file.read()
    if not text.endswith("\n"):  # DVC has nothing to run, or was killed
        os._exit(0)
    request = json.loads(text)
    words = ["-m", request["module"], *request["arguments"]]
    name_process([sys.executable, *words])
    os.environ.clear()
    os.environ.update({**imported, **request["environment"]})
    sys.argv, sys.orig_argv = words[1:], [sys.executable, *words]
    sys.modules.pop(request["module"], None)  # it runs as __main__
    _ask_again()
    try:
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    except SystemExit as wanted:
        end(wanted.code)


def _ask_again() -> None:
    """Let diffusers ask for accelerators, as it does on import in a fresh process; see `without_accelerators`."""
    asked: Any = sys.modules.get("diffusers.utils.torch_utils")
    if asked:
        with suppress(AttributeError):  # names of diffusers 0.42
            asked.TorchDeviceBackend._detect_device_type.cache_clear()
            asked.torch_device = asked.get_device()


def code_state() -> dict[str, tuple[int, int]]:
    """Times of change and sizes of the project's files: while they are the same, the code in memory is the code on disk."""
    tops = (Path(guard.__file__).parent, *map(Path, import_module("dit").__path__))
    files = [Path(folder, name) for top in tops for folder, _, names in os.walk(top) for name in names]
    found = {str(file): file.stat() for file in files if file.suffix in (".py", ".yaml")}
    return {name: (status.st_mtime_ns, status.st_size) for name, status in found.items()}


def name_process(command: list[str]) -> None:
    """Make `ps` show `command` for this process, by overwriting its arguments as far as they reach, padded with zeros."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, stop = int(fields[45]), int(fields[46])  # arg_start and arg_end of proc_pid_stat(5), less the two before
    text = b"".join(os.fsencode(word) + b"\0" for word in command)[: max(stop - start - 1, 0)]
    ctypes.memmove(start, text.ljust(stop - start, b"\0"), stop - start)


def _has_ended(pid: int) -> bool:
    """Whether a child process has ended; if so, it is waited for."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return True


def _fork_that_ends() -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    return pid


def _threads() -> dict[str, str]:
    """Other threads that are alive in this process: their numbers and names."""
    names = {task.name: (task / "comm").read_text().strip() for task in Path(TASKS).iterdir()}
    return {task: name for task, name in names.items() if int(task) != os.getpid() and name not in SPARED_THREADS}


def _has_used_a_gpu() -> bool:
    """Whether this process has opened a GPU's device file: a GPU driver that is in use does not survive a fork."""
    targets = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            targets.append(os.readlink(descriptor))
    return any(target.startswith(GPUS) for target in targets)


def main() -> None:
    """Serve `pipelines.warm` until it closes its end of the socket or is killed."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    name_process([sys.executable, "-m", "pipelines.warm_server"])
    guard.end_with_parent()  # otherwise an import that does not end would outlive the study
    try:
        Server(connection, json.loads(connection.recv(MOST_BYTES))).serve()
    except NotWarmError as error:
        print(error, file=sys.stderr, flush=True)
    connection.close()
    with suppress(ChildProcessError):
        while os.waitpid(-1, 0):
            pass
    os._exit(0)


if __name__ == "__main__":
    main()
