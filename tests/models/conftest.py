"""Prints what the test of the architectures measured."""

COLUMN = "architecture"


def pytest_terminal_summary(terminalreporter):
    """The table of architectures, under the tests' own output; rows travel as properties of the reports."""
    rows = [
        value
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        for name, value in report.user_properties
        if name == COLUMN and report.when == "call"
    ]
    if rows:
        terminalreporter.section("architectures")
        width = max(len(name) for name, _ in rows)
        for name, measured in rows:
            terminalreporter.write_line(f"{name:{width}}  {measured}")
