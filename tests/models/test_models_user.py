"""Models from files of the user's own: real files in a folder of the test."""

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from surefoot.errors import InputError
from surefoot.models import build

TABLE = {"kind": "table", "task": "regression", "input_shape": (6,), "outputs": 2}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(source: str, name: str = "net.py") -> Path:
        path = tmp_path / name
        path.write_text("import torch\nfrom torch import nn\n" + textwrap.dedent(source))
        return path

    return write


def test_factory_gets_what_its_signature_names(write: Write) -> None:
    path = write("""
        def some(input_shape, outputs, width=(3,), depth=4, activation="own", vocabulary_size=99):
            net = nn.Linear(input_shape[0], outputs)
            net.seen = dict(width=width, depth=depth, activation=activation, vocabulary_size=vocabulary_size)
            return net
        def needs(width, task):
            net = nn.Linear(1, 1)
            net.seen = dict(width=width, task=task)
            return net
        def everything(**given):
            net = nn.Linear(1, 1)
            net.seen = given
            return net
        def nothing():
            return nn.Linear(1, 1)
        class Net(nn.Module):
            def __init__(self, outputs):
                super().__init__()
                self.layer = nn.Linear(6, outputs)
    """)
    own = {"width": (3,), "depth": 4, "activation": "own", "vocabulary_size": 99}
    assert build(f"{path}:some", **TABLE).seen == own
    assert build(f"{path}:some", **TABLE, width=[8], depth=1).seen == {**own, "width": (8,), "depth": 1}
    assert build(f"{path}:needs", **TABLE).seen == {"width": None, "task": "regression"}
    assert build(f"{path}:everything", **TABLE, activation="relu").seen == {
        **TABLE, "vocabulary_size": None, "width": None, "depth": None, "activation": "relu"
    }  # fmt: skip
    assert isinstance(build(f"{path}:nothing", **TABLE), nn.Linear)
    assert build(f"{path}:Net", **TABLE).layer.out_features == 2
    with pytest.raises(InputError, match=r"depth=3 has no effect .*'depth'"):
        build(f"{path}:nothing", **TABLE, depth=3)
    with pytest.raises(InputError, match=r"latent=3 has no effect"):
        build(f"{path}:everything", **TABLE, latent=3)


def test_file_imports_its_neighbours_and_leaves_the_path_alone(write: Write) -> None:
    write("def layer(n, m):\n    return nn.Linear(n, m)", "neighbour_of_net.py")
    write("SIZE = 3", "late_neighbour_of_net.py")
    path = write("""
        import sys
        from neighbour_of_net import layer
        sys.path.append("left behind")
        def make(input_shape):
            from late_neighbour_of_net import SIZE
            return layer(input_shape[0], SIZE)
    """)
    before = list(sys.path)
    assert build(f"{path}:make", **TABLE)(torch.zeros(1, 6)).shape == (1, 3)
    assert sys.path == before
    assert not list(path.parent.glob("__pycache__/net.*"))


def test_an_edited_file_is_read_again_and_files_of_one_name_do_not_mix(write: Write, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    path = write("def make():\n    return nn.Linear(1, 2)")
    other = write("def make():\n    return nn.Linear(1, 3)", "other/net.py")
    first = build(f"{path}:make", **TABLE)
    assert build(f"{other}:make", **TABLE).out_features == 3
    write("def make():\n    return nn.Linear(1, 4)")  # same length, same second
    assert build(f"{path}:make", **TABLE).out_features == 4
    assert first.out_features == 2


def test_file_may_use_dataclasses_and_a_relative_path(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("""
        from dataclasses import dataclass
        @dataclass
        class Sizes:
            hidden: "int" = 3  # a string makes dataclasses look the module up
        def make():
            return nn.Linear(1, Sizes().hidden)
    """)
    monkeypatch.chdir(path.parent)
    assert build("net.py:make", **TABLE).out_features == 3


@pytest.mark.parametrize("bad", ["net.py", "net.py:", "folder/net.py"])
def test_factory_not_named(bad: str) -> None:
    with pytest.raises(InputError, match=r"write path/to/file\.py:factory"):
        build(bad, **TABLE)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no file .*absent\.py"):
        build(f"{tmp_path}/absent.py:make", **TABLE)
    with pytest.raises(InputError, match=r"there is no file"):
        build(f"{tmp_path}:make", **TABLE)


def test_not_a_python_file(write: Write) -> None:
    path = write("", "net.txt")
    with pytest.raises(InputError, match=r"must end in \.py"):
        build(f"{path}:make", **TABLE)


@pytest.mark.parametrize(
    ("source", "cause", "words"),
    [
        ("a = 1\nb = undefined_name", NameError, ["NameError: name 'undefined_name'", "line 4 of net.py"]),
        ("import no_such_package", ModuleNotFoundError, ["ModuleNotFoundError", "no_such_package", "line 3"]),
        ("def f(:\n    pass", SyntaxError, ["SyntaxError", "line 3"]),
        ("raise SystemExit(3)", SystemExit, ["SystemExit: 3", "line 3"]),
        ("def f():\n    return 1 / 0\nf()", ZeroDivisionError, ["ZeroDivisionError", "line 4"]),
    ],
)
def test_file_that_does_not_import(write: Write, source: str, cause: type, words: list[str]) -> None:
    path = write(source)
    before, loaded = list(sys.path), set(sys.modules)
    with pytest.raises(InputError, match="does not import") as caught:
        build(f"{path}:make", **TABLE)
    assert isinstance(caught.value.__cause__, cause)
    for word in words:
        assert word in str(caught.value)
    assert sys.path == before
    assert not {name for name in set(sys.modules) - loaded if name.startswith("surefoot_user")}


def test_name_not_in_the_file(write: Write) -> None:
    path = write("def make_net(): ...\nclass Other: ...\nSIZE = 3\ndef _hidden(): ...")
    with pytest.raises(InputError) as caught:
        build(f"{path}:make_nets", **TABLE)
    assert "did you mean 'make_net'" in str(caught.value)
    assert str(caught.value).endswith("Callables there: make_net, Other")
    with pytest.raises(InputError, match="Callables there: none"):
        build(f"{write('')}:make", **TABLE)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("make = 3", ["'make'", "is a int"]),
        ("make = nn.Linear(6, 2)", ["is a Linear", "function that makes"]),
        ("def make():\n    return nn.Linear(1, 'a')", ["make raised TypeError", "line 4 of net.py"]),
        ("def make():\n    return [nn.Linear(1, 1)]", ["returned a list", "torch.nn.Module"]),
        ("def make():\n    pass", ["returned a NoneType"]),
        ("def make(hidden):\n    return nn.Linear(1, hidden)", ["make raised TypeError", "'hidden'"]),
        ("def make():\n    return nn.Flatten()", ["no trainable parameters"]),
        ("def make():\n    return nn.Linear(1, 1).requires_grad_(False)", ["no trainable parameters"]),
        ("def make():\n    return nn.LazyLinear(3)", ["lazy", "input_shape"]),
    ],
)
def test_factory_that_is_of_no_use(write: Write, source: str, words: list[str]) -> None:
    path = write(source)
    with pytest.raises(InputError) as caught:
        build(f"{path}:make", **TABLE)
    for word in words:
        assert word in str(caught.value)
    if "raised" in words[0]:
        assert isinstance(caught.value.__cause__, TypeError)
