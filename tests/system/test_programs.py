"""Programs that the server of the tests forks begin and end as those that Python itself starts."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.kills import Server
from tests.support.programs import Program

PROGRAMS = {
    "words and place": "import os, sys; print(sys.argv, sys.path[0], os.getcwd(), __name__)",
    "environment": "import os; print(sorted(os.environ.items()))",
    "both streams": "import sys; print('ü'); print('b', file=sys.stderr); sys.exit(3)",
    "a message as status": "import sys; sys.exit('no')",
    "an exception": "import sys; sys.tracebacklimit = 0; 1 / 0",
    "an interrupt": "import os, sys; sys.excepthook = lambda *_: None; os.kill(os.getpid(), 2)\n"
    "while True: pass",
    "killed": "import os; os.kill(os.getpid(), 9)",
    "handlers": "import signal as s; print([s.getsignal(i) == s.SIG_DFL for i in (1, 2, 13, 15)],"
    "s.pthread_sigmask(s.SIG_BLOCK, []))",
    "the end": "import atexit, threading, time; atexit.register(print, 'at exit')\n"
    "threading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start(); print('main')",
    "children": "import multiprocessing as m; print(m.active_children(), m.parent_process())\n"
    "child = m.get_context('fork').Process(target=print, args=('child',), kwargs={'flush': True})\n"
    "child.start()",
    "much output": "print('x' * 300_000)",
    "no input": "import sys; print(repr(sys.stdin.read()))",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_run_as_python_runs_it(name: str, server: Server, tmp_path: Path) -> None:
    words = ["-c", PROGRAMS[name], "one", "--two=2"]
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LC_CTYPE": "C.UTF-8"}
    real = subprocess.run(
        [sys.executable, *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=env,
    )
    ended = server.run(*words, cwd=tmp_path, env=env)
    assert (ended.returncode, ended.stdout, ended.stderr) == (
        real.returncode,
        real.stdout,
        real.stderr,
    )


def test_modules_and_files_are_run_as_python_runs_them(server: Server, tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text("name = __name__")
    text = "import sys, other; print(sys.argv, sys.path[0], __name__, __file__, other.name)"
    (tmp_path / "file.py").write_text(text)
    for words in (["-m", "file", "one"], [str(tmp_path / "file.py"), "one"]):
        real = subprocess.run(
            [sys.executable, *words], capture_output=True, text=True, check=True, cwd=tmp_path
        )
        assert server.run(*words, cwd=tmp_path).stdout == real.stdout


def test_a_program_is_talked_to_while_it_runs(server: Server) -> None:
    code = "import time; print('ready', flush=True); time.sleep(60)"
    first, second = server.program("-c", code), server.program("-c", code)
    for program in (first, second):
        assert program.readline() == "ready\n"
        assert program.poll() is None
        assert os.getsid(program.pid) == program.pid
        with pytest.raises(subprocess.TimeoutExpired):
            program.wait(0.01)
    second.send_signal(signal.SIGTERM)
    assert second.wait() == -signal.SIGTERM
    assert first.poll() is None
    first.end()
    assert first.returncode == -signal.SIGKILL
    assert second.communicate() == ("", "")


def test_a_stream_that_somebody_still_holds_is_no_end(server: Server) -> None:
    code = "import os, time; os.fork() or time.sleep(60)"
    program: Program = server.program("-c", code)
    try:
        assert program.wait() == 0
        with pytest.raises(subprocess.TimeoutExpired):
            program.communicate(0.1)
    finally:
        os.killpg(program.pid, signal.SIGKILL)
        program.end()


def test_a_program_that_does_not_end_in_time_is_killed(server: Server, tmp_path: Path) -> None:
    code = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(__import__('os').getpid())); input"
    code += "; import time; time.sleep(60)"
    with pytest.raises(subprocess.TimeoutExpired):
        server.run("-c", code, timeout=0.5)
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()
