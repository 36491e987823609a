import errno

import pytest

from replica.storage.faults import blaming, from_os_error, translated
from rules import errors

TABLE = [
    (errno.ENOSPC, errors.NoSpace),
    (errno.EDQUOT, errors.NoSpace),
    (errno.EFBIG, errors.NoSpace),
    (errno.EROFS, errors.Forbidden),
    (errno.EACCES, errors.Forbidden),
    (errno.EPERM, errors.Forbidden),
    (errno.ELOOP, errors.Forbidden),
    (errno.EISDIR, errors.Forbidden),
    (errno.EXDEV, errors.Forbidden),
    (errno.EEXIST, errors.TargetExists),
    (errno.ENAMETOOLONG, errors.Permanent),
    (errno.EIO, errors.Transient),
    (errno.EMFILE, errors.Transient),
    (errno.ESTALE, errors.Unreachable),
    (errno.ENOTCONN, errors.Unreachable),
    (errno.ENODEV, errors.Unreachable),
    (errno.ETIMEDOUT, errors.TimedOut),
    (errno.EBUSY, errors.Busy),
    (errno.ENOENT, errors.SourceMissing),
    (errno.ENOTDIR, errors.SourceMissing),
    (errno.EBADF, errors.Transient),
]


@pytest.mark.parametrize(("code", "kind"), TABLE, ids=lambda v: errno.errorcode.get(v) if isinstance(v, int) else "")
def test_each_errno_has_one_meaning(code, kind):
    error = from_os_error(OSError(code, "as the system says"), endpoint="TOKYO", path="a/b", side="unknown")
    assert type(error) is kind
    assert (error.endpoint, error.path, error.side) == ("TOKYO", "a/b", "unknown")
    assert "a/b at TOKYO" in error.message


def test_what_is_missing_on_the_target_is_not_missing_at_the_source():
    gone = from_os_error(OSError(errno.ENOENT, ""), endpoint="T", path="f", side="target")
    blocked = from_os_error(OSError(errno.ENOTDIR, ""), endpoint="T", path="f", side="target")
    assert type(gone) is errors.Transient
    assert type(blocked) is errors.TargetExists


def test_an_error_without_a_number_keeps_its_text():
    assert "odd" in from_os_error(OSError("odd"), endpoint="", path="f").message


def test_every_hint_is_a_remedy_for_a_full_or_closed_disk():
    for code in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ESTALE, errno.ELOOP):
        assert from_os_error(OSError(code, ""), endpoint="T", path="f").hint


def test_control_characters_of_a_name_do_not_reach_a_message():
    message = from_os_error(OSError(errno.EIO, ""), endpoint="T", path="a\x1b[2J\nb").message
    assert "\x1b" not in message
    assert "\n" not in message


def test_the_first_blame_stays():
    with pytest.raises(errors.Transient) as told, blaming("target"), blaming("source"), translated("T", "f"):
        raise OSError(errno.EIO, "")
    assert told.value.side == "source"


def test_a_target_that_loses_our_file_never_blames_the_source():
    with pytest.raises(errors.Transient) as told, blaming("target"), translated("T", "f"):
        raise FileNotFoundError(errno.ENOENT, "")
    assert told.value.side == "target"
    assert not isinstance(told.value, errors.SourceMissing)


def test_a_source_that_goes_away_while_the_target_writes_is_still_the_sources_loss():
    """The target's write asks the source for its pieces, so the error passes through both."""
    with pytest.raises(errors.SourceMissing) as told, blaming("target"), blaming("source"):
        raise errors.SourceMissing("gone", endpoint="S", path="f")
    assert told.value.side == "source"
    with pytest.raises(errors.Transient) as told, blaming("target"):
        raise errors.SourceMissing("gone", endpoint="T", path="f")
    assert told.value.side == "target"
