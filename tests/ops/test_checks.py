"""What an unknown name could have been."""

from heedful.ops.checks import did_you_mean, nearest


def test_nearest():
    assert nearest("selectiv", ["softmax", "selective"]) == "selective"
    assert nearest("xyzzy", ["softmax", "selective"]) is None
    assert nearest(None, ["softmax"]) is None
    assert nearest("ab", ["abcd"], cutoff=0.9) is None
    assert did_you_mean("sass", {"sas": 1}) == "did you mean 'sas'? "
    assert did_you_mean("xyzzy", {"sas": 1}) == ""
