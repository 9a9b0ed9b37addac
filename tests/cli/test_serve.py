"""hkd serve: a port where nothing can listen, said before the model is loaded."""

import socket

import pytest

from hkd_d2.cli.dispatch import main


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--port", "70000"], "The port is 70000; give one from 0 to 65535."),
        (["--port", "-1"], "The port is -1; give one from 0 to 65535."),
        (["--port", "{taken}"], "Nothing can listen at 127.0.0.1, port {taken} (Address already"),
        (["--port", "0", "--host", "192.0.2.1"], "Nothing can listen at 192.0.2.1, port 0 ("),
    ],
)
def test_a_port_that_cannot_be_used(words, sentence, capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        words = [word.format(taken=taken) for word in words]
        assert main(["serve", "--model", "none.onnx", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("hkd serve: ") and said.count("\n") == 1
    assert sentence.format(taken=taken) in said
