"""bench/gpu.sh on the GPU that is not there: its Python programs are forked from one process.

That process has imported everything, and computes nothing. As numbers that come from the device
mean nothing, programs read ones; torch.compile returns what it is given: steps are compiled in
tests/system/test_fake_gpu.py.
"""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.fake_gpu import environment_with

ROOT = Path(__file__).parents[2]
MODULES = ("bench.peers", "bench.step", "bench.attack", "bench.ops", "bench.studies.float8")
MODULES += (
    "bench.studies.attention",
    "bench.studies.float8_accuracy",
    "safer_fast.training.trainer",
)
CLIENT = """#!{python} -IS
import json, os, socket, sys
client = socket.socket(socket.AF_UNIX)
client.connect({address!r})
request = json.dumps({{"words": sys.argv[1:], "env": dict(os.environ), "cwd": os.getcwd()}})
socket.send_fds(client, [len(request.encode()).to_bytes(4, "big")], [0, 1, 2])
client.sendall(request.encode())
sys.exit(client.recv(1)[0])
"""


def rehearse(library: Path, folder: Path, *parts: str) -> subprocess.CompletedProcess[str]:
    """Run bench/gpu.sh, or these parts of it, into a folder; small cases, with CUDA graphs.

    library: the folder that `fake_gpu.build` filled.
    """
    address, python = folder / "socket", folder / "python"
    python.write_text(CLIENT.format(python=sys.executable, address=str(address)))
    python.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(address))
        listening.listen()
        server = subprocess.Popen(
            [sys.executable, "-m", __name__, str(listening.fileno())],
            env=environment_with(library) | {"XDG_CACHE_HOME": str(folder / "cache")},
            pass_fds=[listening.fileno()],
            cwd=ROOT,
        )
        try:
            return subprocess.run(
                ["bash", str(ROOT / "bench" / "gpu.sh"), str(folder / "out"), *parts],
                env=os.environ | {"PYTHON": str(python), "GPU_SH_REHEARSE": "graphs"},
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=500,
                check=False,
            )
        finally:
            server.terminate()
            server.wait()


def serve(listening: socket.socket) -> None:
    """Fork a process for each program that is asked for, and tell how it ended."""
    while True:
        client, _ = listening.accept()
        with client:
            size, files, _, _ = socket.recv_fds(client, 4, 3)
            request = json.loads(_received(client, int.from_bytes(size, "big")))
            child = os.fork()
            if not child:
                os._exit(_run(request, files))
            for file in files:
                os.close(file)
            _, status = os.waitpid(child, 0)
            client.sendall(bytes([os.waitstatus_to_exitcode(status) & 255]))


def _received(client: socket.socket, size: int) -> bytes:
    parts = b""
    while len(parts) < size:
        parts += client.recv(size - len(parts))
    return parts


def _run(request: dict[str, Any], files: list[int]) -> int:
    """Run the program of the request in this process; return its exit status."""
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.chdir(request["cwd"])
    signal.alarm(120)
    # of plugins that are imported before it starts
    os.environ["PYTEST_ADDOPTS"] = "-W ignore::pytest.PytestAssertRewriteWarning"
    option, program, *words = request["words"]
    sys.argv = [program, *words]
    try:
        if option == "-c":
            exec(program, {})
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _read_ones() -> None:
    """Make every number that is read from the device a one, and SGD take any learning rate."""
    import torch
    from torch import Tensor

    from tests.support.captured_steps import without_libraries

    def on_device(method: str, value: Any) -> None:
        original = getattr(Tensor, method)

        def read(self: Tensor, *arguments: Any) -> Any:
            result = original(self, *arguments)
            return value(self) if self.is_cuda else result

        setattr(Tensor, method, read)

    for method, kind in (("item", int), ("__int__", int), ("__float__", float), ("__bool__", bool)):
        on_device(method, lambda _, kind=kind: kind(1))
    on_device("tolist", lambda tensor: torch.ones(tensor.shape, dtype=tensor.dtype).tolist())
    torch.compile = lambda function=None, **_: function or (lambda wrapped: wrapped)
    torch.nn.Module.compile = lambda *_, **__: None  # type: ignore[method-assign]
    without_libraries()
    torch.backends.cuda.enable_cudnn_sdp = lambda _: None


if __name__ == "__main__":
    from importlib import import_module

    _read_ones()
    for name in MODULES:
        import_module(name)
    serve(socket.socket(fileno=int(sys.argv[1])))
