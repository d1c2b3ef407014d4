"""The shell scripts: what they start, on how many processes, and with which Python."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts import launch
from tests.conftest import REPOSITORY

SCRIPTS = REPOSITORY / "scripts"
LAUNCHERS = {
    # launcher: (script, options added)
    "autoregressive/extract_codes_c2i.sh": ("autoregressive/train/extract_codes_c2i.py", []),
    "autoregressive/extract_text.sh": ("autoregressive/train/extract_text.py", []),
    "autoregressive/train_c2i.sh": ("autoregressive/train/train_c2i.py", []),
    "autoregressive/train_c2i_fsdp.sh": ("autoregressive/train/train_c2i.py", ["--data-parallel", "fsdp"]),
    "autoregressive/sample_c2i.sh": ("autoregressive/sample/sample_c2i_ddp.py", []),
    "autoregressive/sample_t2i.sh": ("autoregressive/sample/sample_t2i_ddp.py", []),
    "tokenizer/train_vq.sh": ("tokenizer/tokenizer_image/vq_train.py", ["--stage", "single"]),
    "tokenizer/reconstruction_vq.sh": ("tokenizer/tokenizer_image/reconstruction_vq_ddp.py", []),
    "tokenizer/rfid.sh": ("scripts/rfid.py", []),
    "tokenizer/val.sh": ("tokenizer/validation/val_ddp.py", []),
    "evaluations/evaluate_c2i.sh": ("evaluations/c2i/evaluator.py", []),
    "evaluations/clip_score.sh": ("evaluations/t2i/clip_score.py", []),
}


def executable(path: Path, script: str) -> Path:
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)
    return path


@pytest.fixture
def run(tmp_path):
    """Run shell words in an empty folder with a Python that prints its arguments; variables win over the environment."""
    fake = executable(tmp_path / "python", 'echo "$@"\n')

    def started(*words: str | Path, **variables: str) -> list[list[str]]:
        kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
        environment = kept | {"PYTHON": str(fake), "REQUIREMENTS_MET_BY": str(fake)} | variables
        done = subprocess.run(["bash", *map(str, words)], env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [line.split() for line in done.stdout.splitlines()]

    return started


def test_shell_scripts_parse():
    """A script with a syntax error fails only when somebody needs it."""
    for path in [*SCRIPTS.rglob("*.sh"), REPOSITORY / ".ci" / "run"]:
        assert subprocess.run(["bash", "-n", str(path)], capture_output=True).returncode == 0, path.name


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_start_their_script_from_any_folder(run, launcher):
    """LlamaGen's names, two lines each; a path that holds only in the repository's folder would fail elsewhere."""
    script, options = LAUNCHERS[launcher]
    assert run(SCRIPTS / launcher, "--seed", "1", NPROC="1") == [[str(REPOSITORY / script), *options, "--seed", "1"]]
    lines = [line for line in (SCRIPTS / launcher).read_text().splitlines() if not line.startswith("#")]
    assert len(lines) == 2


def test_launchers_take_all_gpus(run, tmp_path):
    """The default of LlamaGen's launchers is a whole node; --help and the evaluation need one process."""
    counting = str(executable(tmp_path / "counting", 'echo "$NPROC" "$@"\n'))
    gpus = {"CUDA_VISIBLE_DEVICES": "0,1,2"}
    [words] = run(SCRIPTS / "autoregressive/train_c2i.sh", "--seed", "1", **gpus, PYTHON=counting, REQUIREMENTS_MET_BY=counting)
    assert words == ["3", str(SCRIPTS / "launch.py"), str(REPOSITORY / "autoregressive/train/train_c2i.py"), "--seed", "1"]
    assert len(run(SCRIPTS / "autoregressive/train_c2i.sh", "--help", **gpus)[0]) == 2
    assert len(run(SCRIPTS / "evaluations/evaluate_c2i.sh", "r.npz", "s.npz", **gpus)[0]) == 3


@pytest.mark.parametrize("visible, listed, count", [
    ("0,1,2,3", None, "4"), ("GPU-8a5", None, "1"), ("", None, "1"), ("", 2, "1"), (None, 2, "2"), (None, 0, "1"),
    (None, None, "1")])
def test_gpus_are_counted_without_torch(run, tmp_path, visible, listed, count):
    """CUDA_VISIBLE_DEVICES first, then nvidia-smi, of which a broken one counts as none; at least one process."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "grep", "tr"):
        (tools / name).symlink_to(shutil.which(name))
    if listed is not None:
        lines = "".join(f"echo 'GPU {number}: NVIDIA H100 (UUID: GPU-{number})'\n" for number in range(listed))
        executable(tools / "nvidia-smi", lines or "echo 'NVIDIA-SMI has failed'; exit 9\n")
    variables = {"PATH": str(tools)} | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    assert run("-c", f"source {SCRIPTS}/setup.sh; gpus", **variables) == [[count]]


def test_two_stages_take_one_run_folder(run):
    """--run-dir, in either spelling, or RUN_DIR is the folder of both runs, and stage 2 starts from stage 1's."""
    def folders(*options: str, **variables: str) -> list[str]:
        lines = [" ".join(line) for line in run(SCRIPTS / "tokenizer/train_dual_vq.sh", *options, NPROC="1", **variables)]
        found = [re.findall(r"--run-dir (\S+)", line)[-1] for line in lines]
        assert "--stage semantic" in lines[0] and f"--stage dual --init-from {found[0]} " in lines[1]
        return found

    assert folders("--data-path", "d") == ["runs/vq/semantic", "runs/vq/dual"]
    assert folders("--run-dir", "R") == folders("--run_dir=R") == folders(RUN_DIR="R") == ["R/semantic", "R/dual"]


@pytest.mark.parametrize("name, code", [("TERM", 143), ("USR1", 143), ("INT", 130)])
def test_a_launcher_passes_signals_on_and_waits(tmp_path, name, code):
    """`kill` of the wrapper must reach the training, whose own end, after its checkpoint, is the wrapper's."""
    said = tmp_path / "said"
    program = (f"import signal, time, sys\nasked = []\nfor each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):\n"
               f"    signal.signal(each, lambda number, frame: asked.append(number))\n"
               f"open({str(said)!r}, 'w').write('ready')\nwhile not asked:\n    time.sleep(0.02)\ntime.sleep(0.5)\n"
               f"open({str(said)!r}, 'w').write(signal.Signals(asked[0]).name)\nsys.exit({code})\n")
    (tmp_path / "own.py").write_text(program)
    environment = os.environ | {"NPROC": "1", "PYTHON": sys.executable, "REQUIREMENTS_MET_BY": sys.executable}
    # A job in the background, as CI may be, ignores SIGINT, and a shell cannot trap what was ignored when it began.
    wrapper = subprocess.Popen(["bash", SCRIPTS / "launch.sh", "own.py"], cwd=tmp_path, env=environment,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while not said.exists():
        time.sleep(0.02)
    wrapper.send_signal(getattr(signal, f"SIG{name}"))
    assert wrapper.wait(20) == code and said.read_text() == f"SIG{name}"


def test_several_nodes_meet_at_node_0():
    """One node takes a free port of its own, so that two jobs on one machine do not meet."""
    alone = launch.words({"NPROC": "2"}, ["x.py"])
    assert alone[alone.index("--rdzv-endpoint") + 1] == "localhost:0" and alone[-1] == "x.py"
    second = launch.words({"NPROC": "2", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "n0"}, ["x.py"])
    assert second[second.index("--rdzv-endpoint") + 1] == "n0:29500" and "is_host=false,join_timeout=600" in second


def test_launch_finds_a_script_by_either_folder(run, tmp_path):
    """`launch.sh` takes a path of the repository, or one that the shell has completed where it is."""
    assert run(SCRIPTS / "launch.sh", "scripts/benchmark.py", "a", NPROC="1") == [[f"{REPOSITORY}/scripts/benchmark.py", "a"]]
    (tmp_path / "own.py").touch()
    assert run(SCRIPTS / "launch.sh", "own.py", NPROC="1") == [[str(tmp_path / "own.py")]]


def set_up(folder: Path, requirements: str, pip: str = "exit 0") -> subprocess.CompletedProcess:
    """Source a copy of setup.sh beside its own requirements, with a python3 that runs `pip` instead of pip."""
    tools = folder / "tools"
    for each in (tools, folder / "scripts"):
        each.mkdir()
    shutil.copy(SCRIPTS / "setup.sh", folder / "scripts")
    (folder / "requirements.txt").write_text(requirements)
    executable(tools / "python3", 'case "$*" in\n"- "*) exit 1 ;;\n"-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;\n'
               f'"-m pip "*) {pip} ;;\nesac\n')
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": sys.executable}
    return subprocess.run(["bash", "-c", 'source scripts/setup.sh; echo "$PYTHON"'], cwd=folder, env=environment,
                          capture_output=True, text=True)


@pytest.mark.parametrize("requirements, met", [
    ("# tests\npytest\n\ntorch>=2.11  # why\n", True), ("torch>=999.1\n", False), ("pytest\nno-such-package\n", False)])
def test_python_is_taken_where_its_packages_meet_the_requirements(tmp_path, requirements, met):
    """Asked of the packages' metadata: a package that is missing or too old leads to an environment of our own."""
    done = set_up(tmp_path, requirements)
    assert done.stdout.strip() == (sys.executable if met else f"{tmp_path}/.venv/bin/python")
    assert ("installing the requirements" in done.stderr) == (not met)


def test_installation_falls_back_to_the_newest_versions(tmp_path):
    """Another Python may lack the tested versions; what pip said about it matters only if the second try fails too."""
    done = set_up(tmp_path, "no-such-package\n", 'echo noise >&2; case "$*" in *constraints.txt*) exit 1 ;; esac')
    assert done.returncode == 0 and "installing the newest" in done.stderr and "noise" not in done.stderr


def test_installation_shows_why_it_failed(tmp_path):
    """No connection, no space: pip's own words."""
    done = set_up(tmp_path, "no-such-package\n", "echo no route to host >&2; exit 1")
    assert done.returncode == 1 and "no route to host" in done.stderr


def test_constraints_name_a_version_of_every_requirement():
    """A requirement without a tested version would float."""
    required, tested = ([re.split(r"[>=]", line)[0] for line in path.read_text().splitlines() if line[0] != "#"]
                        for path in (REPOSITORY / "requirements.txt", SCRIPTS / "constraints.txt"))
    assert required == tested
