from weakseg import progress as module
from weakseg.progress import Progress


def test_items_pass_through_in_every_mode(capsys):
    for mode in ("bar", "lines", "silent"):
        assert list(Progress(mode).each(range(3), "count", total=3)) == [0, 1, 2]


def test_without_a_terminal_there_are_lines(capsys, monkeypatch):
    monkeypatch.setattr(module, "LINE_EVERY_S", 0.0)
    progress = Progress("auto")
    with progress.task("train", total=4, initial=2) as bar:
        bar.update(1, loss=0.25)
    err = capsys.readouterr().err
    assert err.startswith("train: 3/4 images, ")
    assert err.endswith("loss 0.25\n")


def test_silence(capsys, monkeypatch):
    monkeypatch.setattr(module, "LINE_EVERY_S", 0.0)
    progress = Progress("silent")
    progress.say("nothing")
    list(progress.each(range(3), "count", total=3))
    assert capsys.readouterr().err == ""
