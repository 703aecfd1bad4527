"""Every failure has its own exit code, and says what, why and what to do."""

import pytest

from fp8pipe.core import errors

# The documented contract; scripts rely on it.
EXIT_CODES = {
    "ConfigurationError": 10,
    "MissingCapabilityError": 11,
    "BadArtifactError": 12,
    "LintRefusedError": 13,
    "GateFailedError": 14,
    "OutOfMemoryError": 15,
    "InterruptedRunError": 130,
}


def test_every_error_class_has_its_documented_exit_code():
    found = {cls.__name__: cls.exit_code for cls in errors.Fp8PipeError.__subclasses__()}
    found = {name: code for name, code in found.items() if hasattr(errors, name)}
    assert found == EXIT_CODES


@pytest.mark.parametrize(
    ("why", "fix", "lines"),
    [
        ("", "", ["what"]),
        ("because", "", ["what", "  why: because"]),
        ("", "do this", ["what", "  fix: do this"]),
        ("because", "do this", ["what", "  why: because", "  fix: do this"]),
    ],
)
def test_text_holds_the_parts_that_were_given(why, fix, lines):
    assert str(errors.ConfigurationError("what", why=why, fix=fix)).splitlines() == lines


@pytest.mark.parametrize(
    ("error", "line", "with_class"),
    [
        (ValueError("one\ntwo"), "one", "ValueError: one"),
        (ValueError("\n  one \r\ntwo"), "one", "ValueError: one"),
        (ValueError(), "ValueError", "ValueError"),
        (AssertionError(" \n"), "AssertionError", "AssertionError"),
        (KeyError("name"), "'name'", "KeyError: 'name'"),
    ],
)
def test_the_first_line_of_an_error_is_never_empty(error, line, with_class):
    assert (errors.first_line(error), errors.class_and_first_line(error)) == (line, with_class)


@pytest.mark.parametrize(
    ("error", "most", "line", "with_class"),
    [
        (ValueError(" one\n\ttwo  three\n"), 300, "one two three", "ValueError: one two three"),
        (ValueError("one\ntwo"), 5, "one t", "ValueError: one t"),
        (ValueError("x" * 400), None, "x" * 400, f"ValueError: {'x' * 400}"),
        (ValueError(" \n"), 300, "ValueError", "ValueError"),
    ],
)
def test_an_error_on_one_line_is_whole_up_to_a_limit_and_never_empty(error, most, line, with_class):
    assert (errors.one_line(error, most), errors.class_and_one_line(error, most)) == (line, with_class)
