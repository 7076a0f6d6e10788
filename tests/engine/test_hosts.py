"""Hostfiles: what is read, what is refused and how."""

import os
import stat
from pathlib import Path

import pytest

from voxtrast.engine.errors import UserError
from voxtrast.engine.hosts import check_even, check_reachable, chosen_hosts, is_local, read_hostfile


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    path = tmp_path / "hosts"
    path.write_text("# two machines\nnode1 slots=2\n\nnode2 slots=2  # the other\n")
    return path


def test_hosts_in_order_with_comments(hostfile: Path) -> None:
    assert list(read_hostfile(hostfile).items()) == [("node1", 2), ("node2", 2)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("node1 slots=two\n", "line 1: 'node1 slots=two' is not of the form NAME slots=N"),
        ("node1\n", "line 1: 'node1' is not of the form"),
        ("node1 slots=2\nnode1 slots=2\n", "line 2: node1 stands there twice"),
        ("node1 slots=0\n", "line 1: node1 has no slots"),
        ("# nothing\n", "names no host"),
    ],
)
def test_a_bad_hostfile_is_refused_by_its_line(text: str, said: str, hostfile: Path) -> None:
    hostfile.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        read_hostfile(hostfile)


def test_the_chosen_hosts_are_those_that_must_be_even(hostfile: Path) -> None:
    uneven, even = {"node1": 2, "node2": 1}, {"node1": 2, "node2": 2}
    with pytest.raises(UserError, match=r"uneven slots \(node1 2, node2 1\).*--uneven"):
        check_even(hostfile, chosen_hosts(uneven))
    check_even(hostfile, chosen_hosts(uneven, exclude="node1:0"))
    check_even(hostfile, chosen_hosts(uneven, include="node1"))
    check_even(hostfile, chosen_hosts(even))
    with pytest.raises(UserError, match=r"uneven slots \(node1 1, node2 2\)"):
        check_even(hostfile, chosen_hosts(even, include="node1:0@node2"))


def test_a_missing_file(hostfile: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_hostfile(hostfile.with_name("none"))


def test_include_and_exclude() -> None:
    hosts = {"node1": 2, "node2": 3}
    assert chosen_hosts(hosts) == {"node1": [0, 1], "node2": [0, 1, 2]}
    assert chosen_hosts(hosts, include="node2:0,2") == {"node2": [0, 2]}
    assert chosen_hosts(hosts, include="node2@node1:1") == {"node1": [1], "node2": [0, 1, 2]}
    assert chosen_hosts(hosts, exclude="node1@node2:1") == {"node2": [0, 2]}
    for options, said in (
        ({"include": "node3"}, "'node3' is not in the hostfile, which has node1, node2"),
        ({"include": "node1:2"}, "node1 has slots 0 to 1, not 2"),
        ({"exclude": "node1:x"}, "expected NAME or NAME:SLOT"),
        ({"exclude": "node1@node2"}, "leaves no slot"),
        ({"include": "node1", "exclude": "node2"}, "give one of them"),
    ):
        with pytest.raises(UserError, match=said):
            chosen_hosts(hosts, **options)


def test_hosts_that_ssh_does_not_reach_are_named_with_what_it_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text(
        "#!/bin/sh\nfor word; do case $word in\n"
        "unknown) echo 'ssh: Could not resolve hostname unknown' >&2; exit 255;;\n"
        "locked) echo 'locked: Permission denied (publickey).' >&2; exit 255;;\nesac; done\n"
        'case "$*" in *BatchMode=yes*) exit 0;; esac\nexit 1\n'
    )
    ssh.chmod(ssh.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    check_reachable(["node1", "node2"])
    with pytest.raises(UserError) as refused:
        check_reachable(["node1", "unknown", "locked"])
    said = str(refused.value)
    assert said.startswith("2 of 3 hosts cannot be reached (unknown: ssh: Could not resolve hostname unknown; locked: ")
    assert "publickey" in said
    assert "\n" not in said


def test_local_names() -> None:
    assert is_local("localhost")
    assert is_local("127.0.0.1")
    assert not is_local("192.0.2.7")
    assert not is_local("no-such-host.invalid")
