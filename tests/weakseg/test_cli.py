import errno
import json
import subprocess
import sys
from types import ModuleType

import pytest

from weakseg import cli
from weakseg.errors import BundleError, PartialError
from weakseg.version import __version__


@pytest.fixture
def verb(monkeypatch):
    """Installs `main` of a verb called `probe`."""

    def install(main):
        module = ModuleType("probe_module")
        module.main = main
        monkeypatch.setitem(sys.modules, "probe_module", module)
        monkeypatch.setitem(cli.VERBS, "probe", cli.Verb("probe_module", "for tests"))

    return install


def raising(error):
    def main(argv):
        raise error

    return main


def test_help_lists_every_verb_and_loads_no_stage():
    code = "import sys; from weakseg.cli import main; main(['--help']); print(sorted(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(f"  {name} " in done.stdout for name in cli.VERBS)
    loaded = done.stderr
    assert not any(f"'{name}'" in loaded for name in ("torch", "cv2", "numpy", "grpc", "weakseg.run", "training"))


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


def test_without_a_verb_it_is_a_usage_error(capsys):
    assert cli.main([]) == 2
    assert "usage: weakseg" in capsys.readouterr().out


def test_unknown_verb_names_the_nearest(capsys):
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err == "error: unknown verb 'trian': did you mean 'train'?\n"


def test_another_package_of_the_name_of_a_stage_is_named(verb, capsys, monkeypatch, tmp_path):
    """As in a project with a folder serve/; an editable install hides it, tests/deploy/release tries a wheel."""
    (tmp_path / "serve").mkdir()
    (tmp_path / "serve" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "serve"]:
        monkeypatch.delitem(sys.modules, name)
    verb(raising(ModuleNotFoundError("No module named 'serve.commands'", name="serve.commands")))
    assert cli.main(["probe"]) == 1
    message = f"error: expected weakseg's serve.commands, got another package serve at {tmp_path}/serve: install"
    assert capsys.readouterr().err.startswith(message)


def test_every_verb_names_a_module_that_exists():
    from importlib.util import find_spec

    assert all(find_spec(verb.module) is not None for verb in cli.VERBS.values())


def test_arguments_reach_the_verb_after_its_own(verb, monkeypatch):
    seen = []
    verb(lambda argv: seen.append(argv) or 0)
    monkeypatch.setitem(cli.VERBS, "probe", cli.Verb("probe_module", "", ("--only", "train")))
    assert cli.main(["probe", "synthetic", "--seed", "1"]) == 0
    assert seen == [["--only", "train", "synthetic", "--seed", "1"]]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (BundleError("wrong hash"), 1, "wrong hash"),
        (PartialError("2 of 3 images"), 3, "2 of 3 images"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "/full/x.png"), 1, "/full/x.png: No space left on device"),
        (ModuleNotFoundError("no", name="torch.nn"), 1, "pip install 'weakseg[train]'"),
        (ModuleNotFoundError("no", name="grpc"), 1, "pip install 'weakseg[client]'"),
    ],
)
def test_errors_become_messages_and_exit_codes(verb, capsys, error, code, message):
    verb(raising(error))
    assert cli.main(["probe"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err


def test_json_errors_go_to_stdout(verb, capsys):
    verb(raising(BundleError("wrong hash")))
    assert cli.main(["probe", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": {"reason": "BUNDLE", "message": "wrong hash"}}
    assert err == ""


def test_a_missing_module_of_ours_is_a_bug_and_shows_its_trace(verb):
    verb(raising(ModuleNotFoundError("no", name="weakseg.typo")))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["probe"])
