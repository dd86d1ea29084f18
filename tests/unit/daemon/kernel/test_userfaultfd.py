"""fdinfo of userfaultfds: sums, absence, and no permission."""

from pathlib import Path

from refault.daemon.kernel.userfaultfd import Waiting, waiting


def process(proc: Path, *infos: str) -> None:
    for directory in ("fd", "fdinfo"):
        (proc / "7" / directory).mkdir(parents=True)
    (proc / "7" / "fd" / "0").symlink_to("/dev/null")
    (proc / "7" / "fdinfo" / "0").write_text("pos:\t0\nflags:\t02\n")
    for number, info in enumerate(infos, 3):
        (proc / "7" / "fd" / str(number)).symlink_to("anon_inode:[userfaultfd]")
        (proc / "7" / "fdinfo" / str(number)).write_text(info)


def info(pending: int, total: int) -> str:
    return f"pos:\t0\nflags:\t02004002\nmnt_id:\t16\npending:\t{pending}\ntotal:\t{total}\nAPI:\taa:0:3ff\n"


def test_all_userfaultfds_are_summed(tmp_path: Path) -> None:
    process(tmp_path, info(1, 3), info(0, 2))
    assert waiting(7, tmp_path) == Waiting(pending=1, total=5)


def test_a_process_without_one_has_none(tmp_path: Path) -> None:
    process(tmp_path)
    assert waiting(7, tmp_path) is None


def test_what_cannot_be_read_is_not_known(tmp_path: Path) -> None:
    assert waiting(7, tmp_path) is None
    process(tmp_path, "nonsense\n")
    assert waiting(7, tmp_path) is None
