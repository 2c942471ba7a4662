"""The group: what it imports, what it prints and with which status it ends."""

import argparse
import importlib
import os
import signal
import subprocess
import sys
import types

import pytest

from loraplex import __version__
from loraplex.cli.arguments import Parser
from loraplex.cli.main import COMMANDS, Command, main
from loraplex.errors import UserError

HEAVY = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "datasets",
    "altair",
    "vl_convert",
    "rich",
    "pydantic",
    "sklearn",
    "scipy",
)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does: in a process of its own."""
    command = [sys.executable, "-m", "loraplex", *arguments]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=120
    )


raised: list[BaseException] = []


def parser(prog: str) -> Parser:
    """Return the parser of the command `fail`, for which this module stands."""
    return Parser(prog, "Fails.")


def run_command(_: argparse.Namespace) -> None:
    """Raise what the test has chosen."""
    raise raised.pop()


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add the command `fail`, which raises what is in `raised`."""
    module = types.SimpleNamespace(parser=parser, run=run_command)
    monkeypatch.setitem(sys.modules, "failing_command", module)
    monkeypatch.setitem(COMMANDS, "fail", Command("failing_command", ""))


def script_with(name: str, body: str) -> str:
    """Return a program that runs `loraplex NAME` with `body` as that command's code."""
    return (
        "import sys, time, types, warnings\n"
        "from loraplex.cli.arguments import Parser\n"
        "from loraplex.cli.main import COMMANDS, Command, main\n"
        f"def run(_):\n    {body}\n"
        "sys.modules['extra'] = types.SimpleNamespace(parser=lambda prog: Parser(prog, ''), run=run)\n"
        f"COMMANDS['{name}'] = Command('extra', '')\n"
        f"sys.exit(main(['{name}']))"
    )


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], [], ["trian"]])
def test_the_group_imports_nothing_heavy(arguments: list[str]) -> None:
    script = (
        f"import sys; from loraplex.cli.main import main; main({arguments!r}); "
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_importing_the_package_imports_nothing_heavy() -> None:
    script = f"import sys, loraplex; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_exists_under_its_name_and_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(importlib.import_module(COMMANDS[name].module).run)
    assert main([name, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: loraplex {name} ")


def test_help_lists_every_command_with_its_summary() -> None:
    done = run("--help")
    assert done.returncode == 0
    for name, command in COMMANDS.items():
        assert name in done.stdout
        assert command.summary in " ".join(done.stdout.split())


def test_no_arguments_show_the_help() -> None:
    bare = run()
    assert bare.returncode == 0
    assert bare.stdout == run("--help").stdout


def test_an_unknown_command_names_the_nearest_and_ends_with_status_2() -> None:
    done = run("trian", "recipe.yaml")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "error: there is no command 'trian'. Did you mean 'train'? ('loraplex --help' shows what there is)\n"
    )


def test_an_unknown_command_like_no_other_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["xyzzy"]) == 2
    assert (
        "The commands are: demo, train, eval, plan, heads, compare, report, export, inspect, generate, methods."
        in capsys.readouterr().err
    )


@pytest.mark.usefixtures("failing")
def test_a_user_error_is_one_line_and_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    raised.append(UserError("recipe.yaml: unknown key 'lr'.\n  Did you mean 'learning_rate'?"))
    assert main(["fail"]) == 1
    captured = capsys.readouterr()
    assert captured.err == "error: recipe.yaml: unknown key 'lr'. Did you mean 'learning_rate'?\n"
    assert captured.out == ""


@pytest.mark.usefixtures("failing")
def test_traceback_shows_where_the_error_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    raised.append(UserError("first"))
    with pytest.raises(UserError, match="first"):
        main(["--traceback", "fail"])
    monkeypatch.setenv("LORAPLEX_DEBUG", "1")
    raised.append(UserError("second"))
    with pytest.raises(UserError, match="second"):
        main(["fail"])


@pytest.mark.usefixtures("failing")
def test_a_full_disk_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    raised.append(OSError(28, "No space left on device", "run/adapter"))
    assert main(["fail"]) == 1
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device: 'run/adapter'\n"


@pytest.mark.parametrize("defect", [RuntimeError("ours"), FileNotFoundError(2, "ours", "ours")])
@pytest.mark.usefixtures("failing")
def test_a_defect_of_ours_keeps_its_traceback(defect: Exception) -> None:
    raised.append(defect)
    with pytest.raises(type(defect), match="ours"):
        main(["fail"])


@pytest.mark.parametrize(
    ("message", "line"), [("", "interrupted\n"), ("go on with --resume", "interrupted: go on with --resume\n")]
)
@pytest.mark.usefixtures("failing")
def test_an_interruption_is_status_130(capsys: pytest.CaptureFixture[str], message: str, line: str) -> None:
    raised.append(KeyboardInterrupt(*[message] if message else []))
    assert main(["fail"]) == 130
    assert capsys.readouterr().err == line


def test_ctrl_c_in_a_real_process() -> None:
    command = [sys.executable, "-c", script_with("wait", "print('ready', flush=True); time.sleep(60)")]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts its background jobs with SIGINT ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    output, error = process.communicate(timeout=60)
    assert (process.returncode, output, error) == (130, "", "interrupted\n")


def test_our_warnings_are_plain_lines_and_news_for_developers_is_left_out() -> None:
    body = (
        "warnings.warn('two rows\\nwere cut'); "
        "warnings.warn_explicit('renamed', FutureWarning, 'x.py', 1, module='transformers.x')"
    )
    command = [sys.executable, "-c", script_with("warn", body)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "warning: two rows were cut\n")


@pytest.mark.parametrize(
    ("environment", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_threads_spin_briefly_unless_the_user_says_how_they_wait(environment: dict[str, str], spins: str) -> None:
    command = [sys.executable, "-c", script_with("show", "import os; print(os.environ.get('GOMP_SPINCOUNT'))")]
    inherited = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(command, env={**inherited, **environment}, capture_output=True, text=True, check=True)
    assert done.stdout == f"{spins}\n"


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"loraplex {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--trace"], "there is no option '--trace'. Did you mean '--traceback'? ('loraplex --help' shows"),
        (
            ["heads", "rows.jsonl", "--limt", "3"],
            "there is no option '--limt'. Did you mean '--limit'? ('loraplex heads",
        ),
        (
            ["generate", "x", "--prompt", "x", "--max-new-tokens", "0"],
            "tokens: '0' is not a whole number of at least 1",
        ),
        (["eval", "none", "--batch-size", "few"], "argument --batch-size: 'few' is not a whole number of at least 1"),
        (["generate", "x", "--prompt", "x", "--top-p", "2"], "--top-p: '2' is not a number above 0 and at most 1"),
        (["methods", "hetero", "alora"], "too many arguments: alora"),
        (["plan"], "give one recipe, none is given ('loraplex plan --help' shows what there is)"),
    ],
)
def test_a_command_line_that_makes_no_sense(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert line in error
    assert error.count("\n") == 1


def test_a_reader_that_has_gone_is_no_error() -> None:
    command = [sys.executable, "-c", script_with("fill", "[print(number) for number in range(10**5)]")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.stderr is not None
    assert (process.wait(timeout=60), process.stderr.read()) == (1, "")
